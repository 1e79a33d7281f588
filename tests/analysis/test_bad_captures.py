"""Every planted defect is rejected by the check that is meant for it, and by no other; its good twin is not."""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_eplb.analysis.order_check import OrderReport, check_order
from moe_eplb.analysis.readers.any import read_captures
from moe_eplb.analysis.roles import prepare
from moe_eplb.core.protocol import TABLE, Call
from moe_eplb.core.protocol_iteration import ITERATION_ROWS
from moe_eplb.core.verdict import Status
from traces.plant import plant

TRACES = Path(__file__).parents[2] / "traces"
GOOD, BAD = TRACES / "good_captures", TRACES / "bad_captures"
MANIFEST: dict[str, dict[str, Any]] = yaml.safe_load((TRACES / "captures.yaml").read_text(encoding="utf-8"))
LARGEST = 20 << 10
NOT_PROVABLE = {
    "path_b_no_waits.chrome.json.gz": {"joins"},
    "path_b_no_waits.nsys.sqlite.gz": {"joins"},
    "path_b_graph.nsys.sqlite.gz": {"joins", "times", "graph_order"},
}
"""What a good trace does not show, so that it is unknown."""


@cache
def _report(path: Path) -> OrderReport:
    tables = ["tensorrt_llm"] if "tensorrt_llm" in path.name else []
    return check_order(prepare(read_captures([path])), tables)


def _bad(name: str) -> OrderReport:
    tables = ["tensorrt_llm"] if "tensorrt_llm" in MANIFEST[name]["twin"] else []
    return check_order(prepare(read_captures([BAD / name])), tables)


def _statuses(report: OrderReport) -> dict[str, str]:
    return {check.name: check.status.value for check in report.checks}


def test_the_files_are_those_of_the_manifest() -> None:
    assert sorted(path.name for path in BAD.iterdir()) == sorted(MANIFEST)
    assert {entry["twin"] for entry in MANIFEST.values()} <= {path.name for path in GOOD.iterdir()}
    assert len(MANIFEST) >= 15
    for form in (".trace.sqlite.gz", ".nsys.sqlite.gz", ".chrome.json.gz"):
        assert any(name.endswith(form) for name in MANIFEST)
    assert max(path.stat().st_size for folder in (GOOD, BAD) for path in folder.iterdir()) <= LARGEST


@pytest.mark.parametrize("path", sorted(GOOD.iterdir()), ids=lambda path: path.name)
def test_a_good_capture_is_valid_as_far_as_its_format_shows_it(path: Path) -> None:
    report = _report(path)
    assert {c.name for c in report.checks if c.status is Status.UNKNOWN} == NOT_PROVABLE.get(path.name, set())
    assert report.illegal == ()
    assert all(check.status is not Status.INVALID for check in report.checks)


@pytest.mark.parametrize("name", MANIFEST)
def test_a_bad_capture_is_rejected_by_its_check_and_by_no_other(name: str) -> None:
    entry, report = MANIFEST[name], _bad(name)
    expected = _statuses(_report(GOOD / entry["twin"])) | entry.get("also", {}) | {entry["check"]: entry["status"]}
    assert _statuses(report) == expected
    found = report.check(entry["check"])
    assert found.detail
    assert (found.detail.split(" ", 1)[0] == entry["code"]) if "code" in entry else True
    assert report.status is (Status.INVALID if "invalid" in expected.values() else Status.UNKNOWN)


def test_every_row_of_the_protocol_is_planted() -> None:
    planted = set()
    for name, entry in MANIFEST.items():
        if entry["check"] == "call_order":
            illegal = _bad(name).illegal[0]
            assert illegal.code == entry["code"]
            assert 0 < len(illegal.before) <= 3
            assert 0 < len(illegal.after) <= 3
            planted.add((illegal.call.name, illegal.code))
    rows = {(call.name.lower(), row.code) for call in Call for row in TABLE[call]}
    assert {pair for pair in planted if pair[1] not in ITERATION_ROWS} == rows
    assert {code for _, code in planted} >= set(ITERATION_ROWS)


def test_the_generator_makes_the_committed_files_again(tmp_path: Path) -> None:
    plant(tmp_path)
    assert (tmp_path / "captures.yaml").read_text() == (TRACES / "captures.yaml").read_text()
    for folder in (GOOD, BAD):
        made = {path.name: path.read_bytes() for path in (tmp_path / folder.name).iterdir()}
        committed = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert sorted(made) == sorted(committed)
        for name, content in made.items():
            # What is packed has to be equal; how it is packed is up to the version of zlib.
            assert gzip.decompress(content) == gzip.decompress(committed[name]), name
            assert content[4:8] == committed[name][4:8] == bytes(4)
    first = {path.name: path.read_bytes() for path in (tmp_path / BAD.name).iterdir()}
    (tmp_path / BAD.name / "left.over").touch()
    plant(tmp_path)
    assert {path.name: path.read_bytes() for path in (tmp_path / BAD.name).iterdir()} == first
