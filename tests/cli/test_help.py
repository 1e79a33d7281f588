"""Help is complete, and light enough to be asked for without a thought."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from eplbctl.cli import COMMANDS, cli
from moe_eplb.core.errors import EXIT_MEANING

from .conftest import Call

ROOT = Path(__file__).parents[2]
HELP_SECONDS = 0.15


def _paths(group: click.Group, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield (*above, name)
        if isinstance(command, click.Group):
            yield from _paths(command, (*above, name))


PATHS = list(_paths(cli))


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_explains_itself(path: tuple[str, ...], flag: str, call: Call) -> None:
    answer = call(*path, flag)
    assert answer.code == 0
    assert answer.out.startswith(f"Usage: eplbctl {' '.join(path)}")
    summary = answer.out.split("\n\n")[1].strip()
    assert len(summary) > 20


def _options() -> Iterator[tuple[str, click.Parameter]]:
    """What every command takes, with the command's name."""
    for path in PATHS:
        command: click.Command = cli
        for name in path:
            assert isinstance(command, click.Group)
            found = command.get_command(click.Context(command), name)
            assert found is not None
            command = found
        yield from ((" ".join(path), option) for option in command.params)


def test_every_option_explains_itself() -> None:
    for command, option in _options():
        assert not isinstance(option, click.Option) or option.help, f"{command}: {option.name}"


@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
def test_no_option_takes_for_a_number_what_is_none(text: str) -> None:
    seen = 0
    for command, option in _options():
        if isinstance(option.type, click.types.FloatParamType):
            seen += 1
            with pytest.raises(click.BadParameter):
                option.type.convert(text, option, None)
            assert option.type.convert("1", option, None) == 1, f"{command}: {option.name}"
    assert seen >= 10


def test_the_main_help_lists_commands_and_exit_codes(call: Call) -> None:
    out = call("--help").out
    assert all(re.search(rf"^  {name} ", out, re.MULTILINE) for name in COMMANDS)
    for code, meaning in EXIT_MEANING.items():
        assert re.search(rf"^  {int(code)} +{re.escape(meaning)}$", out, re.MULTILINE)


def test_help_imports_nothing_heavy() -> None:
    script = f"""
import sys
from eplbctl.cli import invoke
for path in {PATHS!r}:
    assert invoke([*path, "--help"]) == 0
assert invoke(["--help"]) == 0
heavy = {{"torch", "numpy", "pydantic", "yaml", "tabulate"}} & set(sys.modules)
sys.exit(", ".join(sorted(heavy)) or 0)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_is_quick(tmp_path: Path) -> None:
    # Processor time of the best of several: a busy machine must not fail it. An installed package is compiled.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(tmp_path)
    command = [sys.executable, "-m", "eplbctl", "--help"]
    assert min(_processor_seconds(command, environment) for _ in range(10)) <= HELP_SECONDS


def _processor_seconds(command: list[str], environment: dict[str, str]) -> float:
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime
