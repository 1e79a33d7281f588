"""A stand-in for Nsight Systems' command line: checks what it is called with, runs the program, writes a small export.

What it shall do wrong stands in the environment variable FAKE_NSYS.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

SECRET = "a-secret-of-the-environment"
TRACED = ["-s", "none", "--cpuctxsw=none", "-t", "cuda,nvtx", "--cuda-graph-trace=node", "-o"]
WRONG = os.environ.get("FAKE_NSYS", "")


def main(arguments: list[str]) -> int:
    """What is asked for, as nsys would do it."""
    if arguments == ["--version"]:
        return version()
    if arguments[0] == "profile":
        return profile(arguments[1:])
    if arguments[0] == "export":
        return export(arguments[1:])
    return 9


def version() -> int:
    if WRONG == "no library":
        print("nsys: error while loading shared libraries: libdw.so.1: cannot open shared object file: No such file")
        return 127
    if WRONG == "hangs at its version":
        time.sleep(60)
    print("NVIDIA Nsight Systems version 2025.3.1.90-253135822126v0")
    return 0


def profile(arguments: list[str]) -> int:
    assert arguments[:7] == TRACED, arguments
    report, force, command = Path(arguments[7] + ".nsys-rep"), arguments[8], arguments[9:]
    assert force == "--force-overwrite=true", force
    assert report.parent.stat().st_mode & 0o077 == 0, "others can read the raw report"
    print("Collecting data...", flush=True)
    if WRONG == "fails":
        print("unrecognised option '--cpuctxsw'", file=sys.stderr)
        return 1
    code = subprocess.run(command, check=False).returncode
    if WRONG == "no report":
        print("Importer error: libelf.so.1: cannot open shared object file: No such file or directory")
    else:
        report.write_text(f"raw report with {SECRET}")
    return code


def export(arguments: list[str]) -> int:
    options = dict(argument.partition("=")[::2] for argument in arguments[:-1])
    assert options.keys() == {"--type", "--force-overwrite", "--output"}, arguments
    assert options["--type"] == "sqlite", arguments
    assert SECRET in Path(arguments[-1]).read_text()
    if WRONG == "export fails":
        print("cannot read the report")
        return 3
    if WRONG == "export hangs":
        time.sleep(60)
    if WRONG == "export is damaged":
        Path(options["--output"]).write_text(f"neither {SECRET}")
        return 0
    with sqlite3.connect(options["--output"]) as connection:
        connection.execute("CREATE TABLE META_DATA_CAPTURE (name TEXT NOT NULL, value TEXT)")
        connection.execute("INSERT INTO META_DATA_CAPTURE VALUES ('PROCESS_0:ENVIRONMENT', ?)", (SECRET,))
        connection.execute("INSERT INTO META_DATA_CAPTURE VALUES ('RATE_HZ', '0')")
    connection.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
