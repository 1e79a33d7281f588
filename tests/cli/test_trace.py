"""``eplbctl trace``: what traces are; traces without private parts, in other formats, of several ranks as one."""

from __future__ import annotations

import gzip
import json
import lzma
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from eplbctl.render.inert import inert
from moe_eplb.analysis.readers.any import read_capture

from ..analysis.nsys_files import three_steps_and_two_replays
from ..analysis.profiler_traces import expert_parallel
from .conftest import Call

ROOT = Path(__file__).resolve().parents[2]
GOOD = ROOT / "traces" / "good" / "two_ranks_gathered"


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """An export of Nsight Systems that holds what must not leave the machine."""
    file = three_steps_and_two_replays()
    path = file.write(tmp_path / "export.sqlite")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE TARGET_INFO_SYSTEM_ENV (name TEXT, value TEXT)")
        connection.execute("INSERT INTO TARGET_INFO_SYSTEM_ENV VALUES ('API_TOKEN', 'hunter2hunter2')")
        connection.commit()
    return path


def _profiler(folder: Path, rank: int) -> Path:
    path = expert_parallel().write(folder / f"rank{rank}.json")
    data = json.loads(path.read_text())
    data["distributedInfo"] = {"rank": rank}
    path.write_text(json.dumps(data))
    return path


# -- info ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["text", "markdown", "json"])
def test_info(call: Call, export: Path, form: str) -> None:
    answer = call("trace", "info", str(export), str(GOOD), "--format", form)
    assert answer.code == 0, answer.err
    for part in ("nsys 3.20.3", "moe_eplb", "eplb/step", "MoeBalancer", "start_wait_gpu_stage"):
        assert part in answer.out.replace("\\", "")


def test_info_for_programs(call: Call) -> None:
    (info,) = json.loads(call("trace", "info", str(GOOD), "--format", "json").out)["traces"]
    assert (info["ranks"], info["rank_source"], info["layers"]) == ([0, 1], "stated", [0, 1])
    assert info["counts"]["gpu"] == len(read_capture(GOOD).gpu)
    assert info["alignment"] is None
    assert info["waits_recorded"] is False


def test_info_of_several_says_how_clocks_lie(call: Call, tmp_path: Path) -> None:
    answer = call("trace", "info", *(str(_profiler(tmp_path, rank)) for rank in (0, 1)))
    assert "clock moved by 0 ns" in answer.out


def test_names_in_a_trace_cannot_drive_the_terminal(call: Call, tmp_path: Path) -> None:
    file = three_steps_and_two_replays()
    file.kernel("\x1b[2Jgone\u202e", 90_000, 90_010, 99)
    out = call("trace", "info", str(file.write(tmp_path / "t.sqlite"))).out
    out += call("report", str(tmp_path / "t.sqlite")).out
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert inert("\x1b[2Jgone\u202e") in out


# -- redact ----------------------------------------------------------------------------------------------------------


def test_redacted_copies(call: Call, export: Path, tmp_path: Path) -> None:
    before = export.read_bytes()
    answer = call("trace", "redact", str(export), "-o", "public.sqlite")
    assert answer.code == 0, answer.err
    assert "TARGET_INFO_SYSTEM_ENV" in answer.out
    assert "hunter2" not in answer.out
    assert export.read_bytes() == before
    assert b"hunter2" not in Path("public.sqlite").read_bytes()
    assert len(read_capture(Path("public.sqlite")).gpu) == len(read_capture(export).gpu)
    assert call("trace", "redact", "public.sqlite", "-o", "again.sqlite").out.strip() == "nothing had to be removed"


def test_redacted_in_place(call: Call, export: Path) -> None:
    assert call("trace", "redact", str(export), "--in-place").code == 0
    assert b"hunter2" not in export.read_bytes()


def test_a_redacted_run_folder_is_judged_as_before(call: Call, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(GOOD, run)
    meta = json.loads((run / "meta.json").read_text())
    meta["argv"] = ["eplbctl", "run", "/home/somebody/secret/plans.yaml"]
    (run / "meta.json").write_text(json.dumps(meta))
    answer = call("trace", "redact", str(run), "-o", "public")
    assert answer.code == 0, answer.err
    assert "meta.json: " in answer.out
    assert all(b"somebody" not in path.read_bytes() for path in Path("public").iterdir())
    assert b"somebody" in (run / "meta.json").read_bytes()
    assert call("verify", "public").code == 0
    assert call("report", "public").code == 0


PACKINGS: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
    ".gz": (gzip.compress, gzip.decompress),
    ".xz": (lzma.compress, lzma.decompress),
}
RAW = ["nsys.nsys-rep", "trace.sqlite-shm", "old.sqlite-journal", "notes.txt", "other.json", "events.rank0.bin.bak"]
"""What may lie in a run folder and must not leave it, each with a secret."""


def _run_with_raw_files(run: Path) -> Path:
    shutil.copytree(GOOD, run)
    for name in RAW:
        (run / name).write_bytes(b"API_TOKEN=hunter2hunter2")
    (run / "more").mkdir()
    (run / "more" / "environment").write_text("API_TOKEN=hunter2hunter2")
    return run


def test_a_copy_of_a_run_folder_holds_what_is_known_alone(call: Call, tmp_path: Path) -> None:
    answer = call("trace", "redact", str(_run_with_raw_files(tmp_path / "run")), "-o", "public")
    assert answer.code == 0, answer.err
    assert {path.name for path in Path("public").iterdir()} == {path.name for path in GOOD.iterdir()}
    assert [name for name in (*RAW, "more") if f"not in public: {name}, " not in answer.err] == []
    assert call("verify", "public").code == 0


def test_a_run_folder_with_unknown_files_is_not_redacted_in_place(call: Call, tmp_path: Path) -> None:
    run = _run_with_raw_files(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    answer = call("trace", "redact", str(run), "--in-place")
    assert (answer.code, answer.out) == (2, "")
    assert "E076" in answer.err
    assert "nsys.nsys-rep" in answer.err
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("name", ["kineto.rank0.json", "kineto.json.gz", "nsys.sqlite.xz", "old.sqlite.gz"])
def test_every_form_of_a_capture_in_a_run_folder_is_redacted(
    call: Call, export: Path, tmp_path: Path, name: str
) -> None:
    run = shutil.copytree(GOOD, tmp_path / "run")
    document = b'{"environ": {"A": "hunter2hunter2"}, "traceEvents": []}'
    pack, unpack = PACKINGS.get(Path(name).suffix, (bytes, bytes))
    (run / name).write_bytes(pack(document if name.startswith("kineto") else export.read_bytes()))
    assert call("trace", "redact", str(run), "-o", "public").code == 0
    assert b"hunter2" not in unpack((Path("public") / name).read_bytes())


def test_evidence_of_a_run_is_redacted_row_by_row(call: Call, tmp_path: Path) -> None:
    run = shutil.copytree(GOOD, tmp_path / "run")
    evidence = run / "evidence.rank0.jsonl"
    rows = evidence.read_text().replace('"off":""', '"off":"as /home/somebody/plans.yaml says"')
    evidence.write_text(rows + '{"row":"call","what":"/home/somebody/cut')
    answer = call("trace", "redact", str(run), "-o", "public")
    assert "evidence.rank0.jsonl: 2 rows" in answer.out
    redacted = (Path("public") / evidence.name).read_text()
    assert "somebody" not in redacted
    assert len(redacted.splitlines()) == len(rows.splitlines()) + 1
    assert (Path("public") / "evidence.rank1.jsonl").read_bytes() == (GOOD / "evidence.rank1.jsonl").read_bytes()


@pytest.mark.parametrize("where", [("-o", "public"), ("--in-place",)])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("suffix", ["-wal", "-journal"])
def test_what_is_still_being_written_is_not_redacted(
    call: Call, export: Path, tmp_path: Path, where: tuple[str, ...], whole: bool, suffix: str
) -> None:
    run = shutil.copytree(GOOD, tmp_path / "run")
    trace = run / "nsys.sqlite"
    shutil.copyfile(export, trace)
    Path("link.sqlite").symlink_to(trace)
    Path(f"{trace}{suffix}").write_bytes(b"rows")
    answer = call("trace", "redact", str(run if whole else trace), *where)
    assert (answer.code, answer.out) == (2, "")
    assert ("E076" if whole and where == ("--in-place",) else "E068") in answer.err
    assert call("trace", "redact", "link.sqlite", "-o", "public").code == 2
    assert trace.read_bytes() == export.read_bytes()
    assert not Path("public").exists()


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("nowhere.sqlite", "-o", "x"), "there is no trace"),
        (("{export}",), "--in-place"),
        (("{export}", "-o", "x", "--in-place"), "--in-place"),
        (("{export}", "-o", "{export}", "--force"), "over itself"),
        (("{export}", "-o", "taken"), "E002"),
        (("report.nsys-rep", "-o", "x"), "nsys export"),
        ((".", "-o", "x"), "no run folder"),
        (("taken", "-o", "x"), "E068"),
        (("{run}", "-o", "taken"), "E002"),
    ],
)
def test_wrong_input_of_redact(call: Call, export: Path, arguments: tuple[str, ...], what: str) -> None:
    Path("taken").write_text("nothing of the kind")
    before = {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    answer = call("trace", "redact", *(word.format(export=export, run=GOOD) for word in arguments))
    assert (answer.code, answer.out) == (2, "")
    assert what in answer.err
    assert {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before


# -- convert and merge -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "more"),
    [("t.sqlite", ()), ("t.json", ("--rank", "1")), ("t.json.gz", ("--rank", "1")), ("t", ("--to", "sqlite"))],
)
def test_converted(call: Call, name: str, more: tuple[str, ...]) -> None:
    answer = call("trace", "convert", str(GOOD), "-o", name, *more)
    assert (answer.code, answer.out) == (0, ""), answer.err
    assert "updater" in answer.err
    again = read_capture(Path(name))
    assert again.ranks == ([1] if "--rank" in more else [0, 1])
    assert call("report", name).code == 0
    if name.endswith(".gz"):
        assert json.loads(gzip.decompress(Path(name).read_bytes()))["distributedInfo"] == {"rank": 1}


def test_a_converted_run_gives_the_same_overlap(call: Call) -> None:
    call("trace", "convert", str(GOOD), "-o", "t.sqlite")
    one, other = (json.loads(call("report", t, "--format", "json").out)["trace"] for t in (str(GOOD), "t.sqlite"))
    for pair in ("balancer", "balancer_compute", "communication", "statistic", "handover", "reduction"):
        assert one["overlap"][pair]["ranks"] == other["overlap"][pair]["ranks"], pair
        assert one["overlap"][pair]["layers"] == other["overlap"][pair]["layers"], pair
    status = {check["name"]: check["status"] for check in other["checks"]}
    assert status["call_order"] == "valid"


def test_merged_ranks(call: Call, tmp_path: Path) -> None:
    parts = [str(_profiler(tmp_path, rank)) for rank in (0, 1)]
    answer = call("trace", "merge", *parts, "-o", "job.sqlite", "--offset", "0", "--offset", "500")
    assert answer.code == 0, answer.err
    assert "clock moved by 500 ns, as was given" in answer.err
    job = read_capture(Path("job.sqlite"))
    assert job.ranks == [0, 1]
    starts = [int(job.gpu["start"][job.gpu["rank"] == rank].min()) for rank in (0, 1)]
    assert starts[1] - starts[0] == 500
    assert call("report", "job.sqlite").code == 0


def test_the_offset_that_is_told_is_the_one_in_the_file_and_its_doubt_stays_in_it(call: Call, tmp_path: Path) -> None:
    for rank in (0, 1):
        file = three_steps_and_two_replays()
        for number in range(4):
            end = 1_000_000_000 * number + 100_000 + 250_000 * (number % 2) * rank - 40_000 * rank
            file.kernel(f"ncclDevKernel_AllReduce{number}", end - 1000, end, 77)
        file.write(tmp_path / f"{rank}.sqlite")
    answer = call("trace", "merge", "0.sqlite", "1.sqlite", "-o", "job.sqlite")
    assert answer.code == 0, answer.err
    (told,) = (line for line in answer.err.splitlines() if line.startswith("1.sqlite: "))
    offset = int(told.split("clock moved by ")[1].split(" ns")[0])
    assert offset != 0
    job = read_capture(Path("job.sqlite"))
    starts = [int(job.gpu["start"][job.gpu["rank"] == rank].min()) for rank in (0, 1)]
    assert starts[1] - starts[0] == offset
    assert told in job.notes
    assert told in call("trace", "info", "job.sqlite").out
    assert told in call("trace", "info", "0.sqlite", "1.sqlite").out


@pytest.mark.parametrize("offset", ["99999999999999999999", "4000000000000000000", "-4000000000000000000"])
def test_offsets_that_no_time_can_take(call: Call, tmp_path: Path, offset: str) -> None:
    parts = [str(_profiler(tmp_path, rank)) for rank in (0, 1)]
    for command in (("trace", "merge", "-o", "job.sqlite"), ("report",), ("compare",)):
        answer = call(*command, *parts, "--offset", "0", "--offset", offset)
        assert answer.code == 2, answer.err
        assert "--offset" in answer.err
    assert not Path("job.sqlite").exists()


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("convert", "nowhere", "-o", "x.sqlite"), "E060"),
        (("convert", "{good}", "-o", "x.txt"), "E077"),
        (("convert", "{good}", "-o", "x.json"), "holds one rank"),
        (("convert", "{good}", "-o", "x.json", "--rank", "7"), "no rank 7"),
        (("convert", "{good}", "-o", "taken.sqlite"), "E002"),
        (("convert", "{good}", "-o", "missing/x.sqlite"), "E004"),
        (("convert", "{export}", "-o", "{export}", "--force"), "over itself"),
        (("convert", "{good}"), "--output"),
        (("merge", "{good}", "-o", "x.sqlite"), "E078"),
        (("merge", "{good}", "{good}", "-o", "x.sqlite"), "E066"),
        (("merge", "{good}", "{export}", "-o", "x.sqlite", "--offset", "1"), "E066"),
        (("info",), "Missing argument"),
        (("info", "taken.sqlite"), "E060"),
        (("info", "{empty}"), "E060"),
    ],
)
def test_wrong_input(call: Call, export: Path, tmp_path: Path, arguments: tuple[str, ...], what: str) -> None:
    Path("taken.sqlite").write_text("mine")
    (tmp_path / "empty").mkdir()
    places = {"good": GOOD, "export": export, "empty": tmp_path / "empty"}
    answer = call("trace", *(word.format(**places) for word in arguments))
    assert (answer.code, answer.out) == (2, ""), answer.err
    assert what in answer.err
    assert "Traceback" not in answer.err
    assert Path("taken.sqlite").read_text() == "mine"
    assert not Path("x.sqlite").exists()
    assert not Path("x.json").exists()
    assert not list(Path().glob(".eplbctl*"))
