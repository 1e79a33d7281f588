"""What a report says of a capture it also says of the capture's conversion to Chrome JSON."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from eplbctl.cli import invoke
from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import ROLES
from moe_eplb.analysis.readers.any import read_capture
from moe_eplb.analysis.roles import prepare
from moe_eplb.analysis.trace_report import TraceReport, make_trace_report
from moe_eplb.analysis.writers.chrome import write_chrome
from moe_eplb.core.events import Role
from tests.analysis.captures import MakeCapture

TRACES = Path(__file__).parents[2] / "traces"
CAPTURES = [path for folder in ("recorded", "good_captures", "good") for path in sorted((TRACES / folder).iterdir())]


def _report(path: Path) -> TraceReport:
    """The report without what the form of Chrome JSON is said not to hold: notes, streams' names, graphs' nodes."""
    report = make_trace_report(prepare(read_capture(path)))
    exposed = tuple(replace(one, ranges=()) for one in report.exposed)
    return replace(report, source="", form="", notes=(), stream_names={}, exposed=exposed)


@pytest.mark.parametrize("path", CAPTURES, ids=lambda path: path.name)
def test_every_rank_of_a_capture_has_the_report_of_its_conversion(path: Path, tmp_path: Path) -> None:
    for rank in read_capture(path).ranks:
        made = [tmp_path / f"{rank}.{suffix}" for suffix in ("sqlite", "json")]
        for target in made:
            assert invoke(["trace", "convert", str(path), "-o", str(target), "--rank", str(rank)]) == 0
        of_sqlite, of_chrome = map(_report, made)
        assert of_chrome == of_sqlite


def test_a_table_of_the_users_still_names_what_goes_by_its_name(tmp_path: Path) -> None:
    made = MakeCapture()
    made.range("stage_weights/2", 0, 50, "moe_eplb", payload=4)
    made.launched(None, 10, 100, 110, name="Memcpy DtoD")
    made.launched(None, 60, 120, 130, name="mystery")
    made.launched(None, 64, 140, 150, name="sm90_xmma_gemm")
    write_chrome(made.done(), tmp_path / "t.json", packed=False)
    table = tmp_path / "roles.yaml"
    table.write_text("kernels: [{role: compute, name: mystery}, {role: other, name: gemm}]")
    again = prepare(read_capture(tmp_path / "t.json"), tables=[table])
    assert [ROLES[code] for code in again.gpu["role"]] == [Role.EPLB_MIGRATE, Role.COMPUTE, Role.OTHER]
    assert (again.gpu["layer"].tolist(), again.gpu["iteration"].tolist()) == (
        [2, c.UNKNOWN, c.UNKNOWN],
        [4, c.UNKNOWN, c.UNKNOWN],
    )
