"""Records the golden runs anew, each from the scenario in its own folder, the bad ones with their bug planted.

    python traces/record.py

Needed when a run's evidence has changed; look at the difference before committing it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def record(folder: Path) -> None:
    """Run the folder's scenario again and put the new run in its place."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'tests' / 'session' / 'planted'}{os.pathsep}{ROOT}"}
    if folder.parent.name == "bad":
        environment["PLANTED_BUG"] = folder.name.partition("-")[2]
    with tempfile.TemporaryDirectory() as temporary:
        shutil.copy(folder / "scenario.yaml", temporary)
        command = [sys.executable, "-m", "eplbctl", "run", "scenario.yaml", "--out", "run"]
        done = subprocess.run(command, cwd=temporary, env=environment, timeout=120, check=False)
        if done.returncode != (folder.parent.name == "bad"):
            raise SystemExit(f"{folder}: exit {done.returncode}")
        shutil.rmtree(folder)
        shutil.move(f"{temporary}/run", folder)


if __name__ == "__main__":
    for path in sorted(HERE.glob("*/*/scenario.yaml")):
        record(path.parent)
