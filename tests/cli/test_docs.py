"""The documents name only commands, options, targets and exit codes that exist, and all exit codes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from eplbctl.cli import COMMANDS, cli
from moe_eplb.core.errors import EXIT_MEANING

ROOT = Path(__file__).parents[2]
DOCUMENTS = ["README.md", "CONTRIBUTING.md"]
_BLOCK = re.compile(r"^```(?:console|sh|bash|shell)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`((?:eplbctl|make) [^`\n]+)`")


def _read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def _commands(text: str) -> Iterator[list[str]]:
    """The words of every command line in blocks and in running text."""
    lines = [line for block in _BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    for line in [line.removeprefix("$ ").strip() for line in lines] + _INLINE.findall(text):
        words = shlex.split(line, comments=True)
        if words and words[0] == "torchrun" and "eplbctl" in words:
            words = words[words.index("eplbctl") :]
        if words and Path(words[0]).name in ("eplbctl", "make"):
            yield [Path(words[0]).name, *words[1:]]


def _parse(words: list[str]) -> None:
    """Parse a command line as the program would, without running it; a wrong one raises click's UsageError."""
    command: click.Command = cli
    context = click.Context(cli, info_name="eplbctl", **cli.context_settings)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name, found, words = command.resolve_command(context, words)
        assert name is not None
        assert found is not None
        command, context = found, click.Context(found, parent=context, info_name=name)
    if not {"-h", "--help", "--version"} & set(words):
        command.make_context(context.info_name, [*words], parent=context.parent)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_in_a_document_exists(document: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    found = list(_commands(_read(document)))
    assert found
    for program, *words in found:
        if program == "eplbctl":
            _parse(words)
        else:
            assert {word for word in words if "=" not in word and word.isalpha()} <= targets, words


def test_a_command_that_does_not_exist_is_noticed() -> None:
    _parse(["run", "a.yaml", "--seed", "3"])
    for wrong in (["fly"], ["run", "a.yaml", "--speed", "3"], ["scenario", "fly"], ["run"]):
        with pytest.raises(click.UsageError):
            _parse(wrong)


def test_the_readme_names_every_command() -> None:
    named = {words[1] for words in _commands(_read("README.md")) if words[0] == "eplbctl" and len(words) > 1}
    assert set(COMMANDS) <= named


def test_the_exit_codes_of_the_readme_are_the_programs() -> None:
    rows = re.findall(r"^\| `?(\d+)`? *\| *(.+?) *\|$", _read("README.md"), re.MULTILINE)
    assert dict(rows) == {str(int(code)): meaning for code, meaning in EXIT_MEANING.items()}


def test_the_readme_names_the_test_command_of_ci() -> None:
    assert ["make", "test"] in list(_commands(_read("README.md")))
    assert re.search(r"^make test\b", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
