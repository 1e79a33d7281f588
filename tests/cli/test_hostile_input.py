"""Whatever a file or an argument holds, a command answers with one error that names the place, and never waits."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import SMALL, Call

MODEL = "{layers: 2, experts: 4, top_k: 2, hidden: 16, intermediate: 8}"
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 8)
)


def small(old: str, new: str) -> str:
    """The small scenario with one text replaced."""
    assert old in SMALL
    return SMALL.replace(old, new)


# content, code, place of the error, and words that the error must hold
TEXTS: dict[str, tuple[str | bytes, str, str, str]] = {
    "nothing": ("", "E025", "s.yaml", "empty"),
    "only a comment": ("# nothing\n", "E025", "s.yaml", "empty"),
    "a list": ("- 1\n- 2\n", "E025", "s.yaml", "mapping"),
    "a word": ("hello\n", "E025", "s.yaml", "mapping"),
    "an open bracket": (small("}\nworkload", "\nworkload"), "E021", "s.yaml:5:9", "YAML"),
    "a tab": ("ranks: 2\nmodel:\n\tlayers: 1\n", "E021", "s.yaml:3:1", "tabs"),
    "two documents": (SMALL + "---\n" + SMALL, "E021", "s.yaml:7:1", "one document"),
    "a NUL byte": (SMALL.encode() + b"x: \x00\n", "E021", "s.yaml:7:4", "0x0"),
    "a control character": (SMALL + "x: \x07\n", "E021", "s.yaml:7:4", "0x7"),
    "latin-1": (SMALL.encode() + b"# \xe9\n", "E020", "s.yaml", "UTF-8"),
    "UTF-16": (SMALL.encode("utf-16"), "E020", "s.yaml", "UTF-8"),
    "UTF-32": (SMALL.encode("utf-32"), "E020", "s.yaml", "UTF-8"),
    "binary": (bytes(range(256)) * 40, "E020", "s.yaml", "UTF-8"),
    "a zip archive": (b"PK\x03\x04" + b"\x00" * 100, "E021", "s.yaml:1:3", "not allowed in YAML"),
    "too many bytes": (b"# " + b"x" * (2 << 20), "E020", "s.yaml", "bytes"),
    "too many values": ("x: [" + "1," * 150_000 + "1]\n", "E023", "s.yaml:1:", "values"),
    "deep in brackets": ("x: " + "[" * 5000 + "]" * 5000, "E023", "s.yaml:1:", "nested"),
    "deep in dashes": ("- " * 5000 + "x\n", "E023", "s.yaml:1:", "nested"),
    "deep in keys": ("".join(" " * i + "k:\n" for i in range(500)), "E023", "s.yaml:", "nested"),
    "a bomb of aliases": (LAUGHS, "E023", "s.yaml:1:", "aliases"),
    "an alias of itself": ("a: &a [*a]\n", "E023", "s.yaml:1:4", "aliases"),
    "an alias of nothing": ("a: *b\n", "E021", "s.yaml:1:4", "undefined alias"),
    "a python tag": ("a: !!python/object/apply:os.system [ls]\n", "E024", "s.yaml:1:4", "not allowed"),
    "a merge key": (small("ranks: 2", "<<: {ranks: 2}"), "E031", "s.yaml:2:1", "unknown key '<<'"),
    "a key twice": (SMALL + "ranks: 3\n", "E022", "s.yaml:7:1", "s.yaml:2:1"),
    "a key twice inside": (small("top_k: 2,", "top_k: 2, top_k: 2,"), "E022", "s.yaml:4:42", "twice"),
    "a key that is a list": ("? [1]\n: 2\n", "E024", "s.yaml:1:3", "key"),
    "on as a key": (SMALL + "on: 1\n", "E030", "s.yaml:7:1", "unknown key 'on'"),
    "true as a key": (SMALL + "true: 1\n", "E024", "s.yaml:7:1", "key"),
    "a number as a key": (SMALL + "7: 1\n", "E031", "s.yaml:7:4", "strings, not 7"),
    "a misspelt key": (small("top_k", "topk"), "E03", "s.yaml", "did you mean 'top_k'?"),
    "a misspelt section": (small("workload", "workloads"), "E030", "s.yaml:5:1", "did you mean 'workload'?"),
    "a misspelt kind": (small("zipf", "zipff"), "E031", "s.yaml:5:18", "did you mean 'zipf'?"),
    "words for numbers": (small("ranks: 2", "ranks: two"), "E031", "s.yaml:2:8", "ranks"),
    "yes for a number": (small("ranks: 2", "ranks: yes"), "E031", "s.yaml:2:8", "'yes'"),
    "no ranks": (small("ranks: 2", "ranks: 0"), "E031", "s.yaml:2:8", "greater than or equal to 1"),
    "too many ranks": (small("ranks: 2", "ranks: 65"), "E031", "s.yaml:2:8", "less than or equal to 64"),
    "half a rank": (small("ranks: 2", "ranks: 1.5"), "E031", "s.yaml:2:8", "integer"),
    "a googol": (small("ranks: 2", "ranks: 1" + "0" * 99), "E031", "s.yaml:2:8", "ranks"),
    "too many digits": (small("ranks: 2", "ranks: 1" + "0" * 5000), "E024", "s.yaml:2:8", "not allowed"),
    "infinity": (SMALL + "timeout_s: .inf\n", "E031", "s.yaml:7:12", "finite"),
    "not a number": (SMALL + "timeout_s: .nan\n", "E031", "s.yaml:7:12", "finite"),
    "no time": (SMALL + "timeout_s: 0\n", "E031", "s.yaml:7:12", "greater than 0"),
    "top_k above the experts": (small("top_k: 2", "top_k: 5"), "E032", "s.yaml:4:", "top_k 5"),
    "slots that do not divide": (small("slots_per_rank: 3", "num_slots: 7"), "E032", "s.yaml:6:23", "num_slots: 8"),
    "fewer slots than experts": (small("slots_per_rank: 3", "num_slots: 2"), "E032", "s.yaml:6:23", "num_slots: 4"),
    "null for a section": (small(MODEL, "null"), "E031", "s.yaml:4:8", "model"),
    "a list for a section": (small("{kind: zipf, tokens_per_rank: 8}", "[]"), "E031", "s.yaml:5:11", "workload"),
    "a threshold that is none": (SMALL + "checks: {thresholds: {commits: lots}}\n", "E03", "s.yaml:7:32", "commits"),
    "a call that is none": (SMALL + "calls: [start_itr]\n", "E03", "s.yaml:7:9", "start_iter"),
    "half a surrogate": (SMALL.replace("a small one", '"\\uD800"'), "E024", "s.yaml:1:14", "surrogate"),
}  # fmt: skip


def assert_one_error(err: str, code: str, where: str, words: str) -> None:
    first = err.splitlines()[0]
    assert first.startswith(f"error[{code}"), err
    assert where in err
    assert words in err
    assert err.count("error[") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize("what", TEXTS)
@pytest.mark.parametrize("command", [("scenario", "check"), ("run",)], ids=" ".join)
def test_bad_text(what: str, command: tuple[str, ...], call: Call) -> None:
    content, code, where, words = TEXTS[what]
    Path("s.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    answer = call(*command, "s.yaml")
    assert (answer.code, answer.out) == (2, "")
    assert_one_error(answer.err, code, where, words)


GOOD = {
    "a byte order mark": b"\xef\xbb\xbf" + SMALL.encode(),
    "Windows' line ends": SMALL.replace("\n", "\r\n").encode(),
    "old line ends": SMALL.replace("\n", "\r").encode(),
    "no line end": SMALL.rstrip("\n").encode(),
    "an alias": small("{kind: zipf, tokens_per_rank: 8}", "{kind: zipf, tokens_per_rank: &n 8}").encode(),
}


@pytest.mark.parametrize("what", GOOD)
def test_odd_text_that_is_good(what: str, call: Call) -> None:
    Path("s.yaml").write_bytes(GOOD[what])
    answer = call("scenario", "check", "s.yaml")
    assert (answer.code, answer.err) == (0, ""), answer.err


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "E003"),
    "a folder": (Path.mkdir, "E001"),
    "a pipe": (os.mkfifo, "E016"),
    "a loop of links": (loop, "E016"),
    "a dangling link": (link_to("nowhere"), "E003"),
    "a device that never ends": (link_to("/dev/zero"), "E016"),
    "an empty device": (link_to("/dev/null"), "E016"),
    "a link to a folder": (link_to("."), "E001"),
}  # fmt: skip


@pytest.mark.parametrize("what", PLACES)
@pytest.mark.parametrize(
    "command", [("run",), ("verify",), ("scenario", "check"), ("scenario", "show"), ("scenario", "list")], ids=" ".join
)
def test_a_path_that_leads_to_no_scenario(what: str, command: tuple[str, ...], call: Call) -> None:
    make, code = PLACES[what]
    make(Path("thing.yaml"))
    answer = call(*command, "thing.yaml")
    if what == "a link to a folder":  # which holds the link as thing.yaml, and that is not read
        assert answer.code == 2
        return
    assert (answer.code, answer.out) == (2, "")
    assert_one_error(answer.err, code, "thing.yaml" if code != "E001" else "", "")


@pytest.mark.parametrize("what", [name for name, (_, code) in PLACES.items() if code != "E001"])
def test_what_lies_in_a_folder_of_scenarios(what: str, call: Call) -> None:
    Path("many").mkdir()
    Path("many/a.yaml").write_text(SMALL)
    PLACES[what][0](Path("many/b.yaml"))
    answer = call("scenario", "check", "many")
    if what == "missing":
        assert answer.code == 0
        return
    assert (answer.code, answer.out) == (2, "")
    assert_one_error(answer.err, "E020", "many/b.yaml", "why: ")


ARGUMENTS: dict[str, tuple[tuple[str, ...], str]] = {
    "an empty path": (("run", ""), "E013"),
    "an empty path to judge": (("verify", ""), "E013"),
    "an empty path to report": (("report", ""), "E013"),
    "a name that is too long": (("run", "x" * 5000), "E016"),
    "a path that is too long": (("scenario", "check", "x/" * 5000), "E016"),
    "a path through a file": (("run", "s.yaml/x.yaml"), "E003"),
    "a report of a file": (("report", "s.yaml"), "E060"),
    "a report of a pipe": (("report", "pipe"), "E060"),
    "no key": (("run", "s.yaml", "--set", "=2"), "E033"),
    "no value": (("run", "s.yaml", "--set", "ranks"), "E033"),
    "an empty change": (("run", "s.yaml", "--set", ""), "E033"),
    "only dots": (("run", "s.yaml", "--set", "...=2"), "E033"),
    "a way through a number": (("run", "s.yaml", "--set", "ranks.x=2"), "E033"),
    "an index of a mapping": (("run", "s.yaml", "--set", "model.0=2"), "E031"),
    "an unknown key": (("run", "s.yaml", "--set", "model.layer=2"), "E030"),
    "a value that is no YAML": (("run", "s.yaml", "--set", "ranks=[1"), "E021"),
    "a value with a tag": (("run", "s.yaml", "--set", "ranks=!!python/name:os.system"), "E024"),
    "a deep value": (("run", "s.yaml", "--set", "ranks=" + "[" * 1000), "E023"),
    "a deep key": (("run", "s.yaml", "--set", "a." * 5000 + "b=1"), "E0"),
    "a control character": (("run", "s.yaml", "--set", "ranks=\x07"), "E021"),
    "an emptied section": (("run", "s.yaml", "--set", "model="), "E031"),
    "negative ranks": (("run", "s.yaml", "--ranks", "-1"), "E031"),
    "a seed of many digits": (("run", "s.yaml", "--seed", "9" * 400), "E0"),
}


@pytest.mark.parametrize("what", ARGUMENTS)
def test_bad_arguments(what: str, call: Call) -> None:
    Path("s.yaml").write_text(SMALL)
    os.mkfifo("pipe")
    arguments, code = ARGUMENTS[what]
    answer = call(*arguments)
    assert (answer.code, answer.out) == (2, "")
    assert_one_error(answer.err, code, "", "")


@pytest.mark.parametrize(
    "arguments", [("run", "--", "-x.yaml"), ("run", "./-x.yaml"), ("scenario", "check", "--", "-x")]
)
def test_names_that_look_like_options(arguments: tuple[str, ...], call: Call) -> None:
    answer = call(*arguments)
    assert answer.code == 2
    assert answer.err.startswith(f"error[E003]: there is no {arguments[-1].removeprefix('./')}")


def test_a_folder_that_is_not_text(call: Call) -> None:
    folder = Path(os.fsdecode(b"f\xff\xfe"))
    folder.mkdir()
    (folder / "s.yaml").write_text(SMALL)
    answer = call("scenario", "list", folder)
    assert answer.code == 0
    (folder / "s.yaml").write_text("ranks: 0\n")
    answer = call("scenario", "check", folder)
    assert answer.code == 2
    assert "f\\udcff\\udcfe/s.yaml:1:8" in answer.err


@pytest.mark.parametrize("way", ["folder", "file"])
def test_what_must_not_be_read_is_told(way: str, call: Call, tmp_path: Path) -> None:
    Path("many").mkdir()
    Path("many/s.yaml").write_text(SMALL)
    assert call("scenario", "check", "many").code == 0  # with everything imported that nobody else may read
    locked = Path("many") if way == "folder" else Path("many/s.yaml")
    locked.chmod(0)
    tmp_path.chmod(0o755)
    superuser = os.geteuid() == 0
    if superuser:  # who may read everything
        os.seteuid(65534)
    try:
        answer = call("scenario", "check", "many")
    finally:
        if superuser:
            os.seteuid(0)
        locked.chmod(0o755)
    assert (answer.code, answer.out) == (2, "")
    assert_one_error(answer.err, "E0", str(locked), "Permission denied")
