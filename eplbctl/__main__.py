"""``python -m eplbctl``."""

from __future__ import annotations

from eplbctl.cli import main

if __name__ == "__main__":
    main()
