"""Loading a run folder: what is missing or damaged is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moe_eplb.analysis.run_folder import Place, load
from moe_eplb.core.errors import ScenarioError, TraceError
from moe_eplb.core.evidence import Row
from tests.support.run_folders import good_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return good_run().write(tmp_path / "run")


def test_a_good_folder_loads_whole(folder: Path) -> None:
    loaded = load(folder)
    assert (loaded.scenario.name, loaded.meta["state"], loaded.moving) == ("miniature", "finished", True)
    assert len(loaded.places) == 8
    assert list(loaded.evidence.by_place(Row.ROUTED)) == loaded.places
    assert sorted(loaded.evidence.by_place(Row.COMMIT)[Place(1, 2)]) == [0, 1]
    assert loaded.trace is not None


DAMAGED = {
    "no text": lambda text: b"\xff\xfe" + text,
    "a number that is a word": lambda text: text.replace(b'"layer": 1', b'"layer": "one"', 1),
    "a row without a rank": lambda text: text.replace(b'"rank": 0, ', b"", 1),
    "a row of another rank": lambda text: text.replace(b'"rank": 0', b'"rank": 7', 1),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_evidence_is_named(what: str, folder: Path) -> None:
    file = folder / "evidence.rank0.jsonl"
    file.write_bytes(DAMAGED[what](file.read_bytes()))
    with pytest.raises(TraceError, match="E050") as caught:
        load(folder)
    assert caught.value.where.startswith(str(file))


def test_placements_know_their_slots_where_ranks_did_not_repeat_them(folder: Path) -> None:
    placements = load(folder).placements
    assert placements[Place(0, 2)][1]["slots"] == placements[Place(0, 1)][1]["slots"]
    assert placements[Place(0, 1)][1]["slots"] != placements[Place(0, 0)][1]["slots"]


def test_a_placement_whose_slots_were_never_written_is_left_out(tmp_path: Path) -> None:
    run = good_run()
    (row,) = run.find("placement", rank=1, layer=0, iteration=2)
    row["digest"] = 77
    assert list(load(run.write(tmp_path)).placements[Place(0, 2)]) == [0]


def test_the_last_line_of_a_killed_rank_is_left_out(folder: Path) -> None:
    path = folder / "evidence.rank1.jsonl"
    path.write_text(path.read_text()[:-20])
    ends = load(folder).evidence.rows(Row.END)
    assert [row["rank"] for row in ends] == [0]


DAMAGES: dict[str, tuple[type[Exception], str, Callable[[Path], object]]] = {
    "no scenario": (TraceError, "E057", lambda folder: (folder / "scenario.yaml").unlink()),
    "no meta": (TraceError, "E057", lambda folder: (folder / "meta.json").unlink()),
    "half a meta": (TraceError, "E054", lambda folder: (folder / "meta.json").write_text('{"tool": ')),
    "meta is a list": (TraceError, "E054", lambda folder: (folder / "meta.json").write_text("[]")),
    "a bad scenario": (ScenarioError, "ranks", lambda folder: (folder / "scenario.yaml").write_text("ranks: no\n")),
    "evidence without rank": (TraceError, "E050", lambda folder: (folder / "evidence.rankx.jsonl").write_text("")),
    "evidence that is no row": (
        TraceError,
        "E050",
        lambda folder: (folder / "evidence.rank0.jsonl").write_text("[1]\n{}"),
    ),
    "a trace of zero bytes": (TraceError, "E056", lambda folder: (folder / "trace.sqlite").write_bytes(b"")),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_a_clear_error(what: str, folder: Path) -> None:
    kind, text, damage = DAMAGES[what]
    damage(folder)
    with pytest.raises(kind, match=text):
        load(folder)
