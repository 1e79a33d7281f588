"""What a whole model says is compared token by token; another token passes where the original likes it as well."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from moe_eplb.analysis.judges.generation import generation
from moe_eplb.analysis.run_folder import Evidence, RunFolder
from moe_eplb.core.verdict import CheckResult, Status

EXPECTED = [[1, 2, 3], [4, 5, 6]]
SAME = [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def _judge(dtype: str, *rows: dict[str, Any]) -> CheckResult:
    """Of runs of one rank with two sequences of three tokens."""
    model = SimpleNamespace(dtype=dtype)
    scenario = SimpleNamespace(iterations=3, sequences=lambda rank: 2, model=model)
    common = {"row": "generated", "rank": 0, "layer": -1, "iteration": -1}
    evidence = Evidence(common | {"expected": EXPECTED} | row for row in rows)
    return generation(cast(RunFolder, SimpleNamespace(scenario=scenario, ranks=range(1), evidence=evidence)))


def _other(gap: float | None) -> dict[str, Any]:
    """The second sequence says another token in the middle."""
    return {"tokens": [[1, 2, 3], [4, 9, 6]], "gaps": [SAME[0], [0.0, gap, 0.0]]}


def test_the_same_tokens_are_valid() -> None:
    result = _judge("float32", {"tokens": EXPECTED, "gaps": SAME})
    assert (result.status, result.observed) == (Status.VALID, "6 tokens of 1 ranks compared")


@pytest.mark.parametrize(
    ("dtype", "gap", "status"),
    [
        ("bfloat16", 0.0, Status.VALID),
        ("bfloat16", 0.01, Status.VALID),
        ("bfloat16", 0.03, Status.INVALID),
        ("float32", 0.01, Status.INVALID),
        ("bfloat16", -1.0, Status.INVALID),
        ("bfloat16", float("nan"), Status.INVALID),
        ("bfloat16", None, Status.INVALID),
    ],
)
def test_another_token_must_be_as_good(dtype: str, gap: float | None, status: Status) -> None:
    result = _judge(dtype, _other(gap))
    assert result.status is status
    if status is Status.VALID:
        assert result.observed.endswith("1 of them as good as the expected ones")
    else:
        assert result.detail == "sequence 1 says 9 instead of 5 at token 1"


def test_a_row_without_gaps_excuses_nothing() -> None:
    row = _other(0.0)
    del row["gaps"]
    assert _judge("bfloat16", row).status is Status.INVALID


def test_where_every_token_is_another_one_nothing_was_compared() -> None:
    assert _judge("bfloat16", {"tokens": [[7] * 3] * 2, "gaps": SAME}).status is Status.UNKNOWN


def test_no_row_and_short_texts_are_unknown() -> None:
    assert _judge("float32").status is Status.UNKNOWN
    assert _judge("float32", {"tokens": [[1, 2], [4, 5]], "gaps": SAME}).status is Status.UNKNOWN
