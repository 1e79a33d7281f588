"""``eplbctl completion``: shells get a script, and the script gets completions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import Call

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_a_script(shell: str, call: Call) -> None:
    answer = call("completion", shell)
    assert answer.code == 0
    assert f"_EPLBCTL_COMPLETE={shell}_complete" in answer.out


def test_other_shells_are_refused(call: Call) -> None:
    assert call("completion", "csh").code == 2


def test_commands_are_completed() -> None:
    asked = {"_EPLBCTL_COMPLETE": "bash_complete", "COMP_WORDS": "eplbctl ver", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "eplbctl"], cwd=ROOT, env=os.environ | asked, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["plain,verify"]
