"""Kernels that were compiled from other sources are not run again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_eplb.planning.kernels.compiled import forget_others

CALLEE = "from numba import njit\n\n\n@njit(cache=True)\ndef value():\n    return {value}\n"
CALLER = """\
from pathlib import Path
{forget}
from numba import njit
from callee import value


@njit(cache=True)
def twice():
    return 2 * value()


print(twice())
"""
FORGET = "from moe_eplb.planning.kernels.compiled import forget_others\nforget_others(Path(__file__).parent)\n"


def _run(folder: Path, value: int, *, forget: bool) -> int:
    (folder / "callee.py").write_text(CALLEE.format(value=value))
    caller = folder / "caller.py"
    if not caller.exists():
        caller.write_text(CALLER.format(forget=FORGET if forget else ""))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    done = subprocess.run([sys.executable, str(caller)], env=environment, capture_output=True, timeout=120, check=True)
    return int(done.stdout)


def test_a_kernel_whose_callee_has_changed_is_compiled_anew(tmp_path: Path) -> None:
    assert [_run(tmp_path, value, forget=True) for value in (1, 5)] == [2, 10]


def test_numba_by_itself_would_go_on_with_the_old_one(tmp_path: Path) -> None:
    """When this fails, numba has learnt it and `forget_others` can go."""
    assert [_run(tmp_path, value, forget=False) for value in (1, 5)] == [2, 2]


def test_what_is_current_is_kept(tmp_path: Path) -> None:
    (tmp_path / "kernel.py").write_text("1")
    forget_others(tmp_path)
    kept = tmp_path / "__pycache__" / "kernel.nbi"
    kept.touch()
    forget_others(tmp_path)
    assert kept.exists()
    (tmp_path / "kernel.py").write_text("2")
    forget_others(tmp_path)
    assert not kept.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_cannot_be_written_is_left_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    forget_others(tmp_path)
    assert list(tmp_path.iterdir()) == []
