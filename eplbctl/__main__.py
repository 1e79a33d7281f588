"""The entry point, also as ``python -m eplbctl``. It listens for signals before it imports what takes time."""

from __future__ import annotations

import signal
import sys
from typing import NoReturn

from eplbctl import signals

__all__ = ["main"]


def main() -> NoReturn:
    """Run the command line of this process. SIGINT, SIGTERM and SIGHUP end it after it has cleaned up."""
    try:
        signals.listen()
        from eplbctl.cli import invoke

        code = invoke(sys.argv[1:])
        signals.ignore()
    except signals.Terminated as terminated:
        from eplbctl.output import say

        say(f"ended by {signal.Signals(terminated.number).name}", err=True)
        code = terminated.exit_code
    sys.exit(code)


if __name__ == "__main__":
    main()
