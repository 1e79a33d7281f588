"""Plans that are dropped again and again do not fill the log."""

from __future__ import annotations

import pytest

from moe_eplb.balancer.drop_log import DropLog, is_told, which

TOLD = [1, 2, 3, 4, 8, 16, 32, 64]


def _drop(log: DropLog, due: int) -> None:
    log.dropped(due, due + 1, "too late", ready=1, ranks=2, differ=due == 2)


def test_the_first_are_told_and_then_ever_fewer(caplog: pytest.LogCaptureFixture) -> None:
    log, asked = DropLog(3), []
    for due in range(1, 101):
        asked.append(log.tells)
        _drop(log, due)
    assert [due for due, tells in enumerate(asked, 1) if tells] == TOLD == [n for n in range(1, 101) if is_told(n)]
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == len(TOLD)
    assert told[0] == "layer 3: plan for iteration 1 dropped in iteration 2: too late (ready on 1 of 2 ranks)"
    assert told[1].endswith("(ready on 1 of 2 ranks, digests differ)")
    assert told[-2].endswith("; the 32nd in a row")
    assert told[-1].endswith("; the 64th in a row")
    assert which(512) == "; the 512th in a row"


def test_a_commit_begins_a_new_row(caplog: pytest.LogCaptureFixture) -> None:
    log = DropLog(0)
    for due in range(7):
        _drop(log, due)
    assert len(caplog.records) == 4
    log.committed()
    assert log.tells
    _drop(log, 9)
    assert len(caplog.records) == 5
    assert "in a row" not in caplog.records[-1].getMessage()
