from __future__ import annotations

import pytest

from moe_eplb.core.errors import ScenarioError
from moe_eplb.core.thresholds import METRICS, Threshold, parse, parse_all


def test_every_metric_says_what_it_means() -> None:
    assert all(info.meaning for info in METRICS.values())
    assert len({info.meaning for info in METRICS.values()}) == len(METRICS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("p50 >= 0.9", ("p50", ">=", 0.9)),
        ("  max<1e-3 ", ("max", "<", 1e-3)),
        (">=.5", (None, ">=", 0.5)),
        ("== -2.", (None, "==", -2.0)),
        ("p90 >= 1", None),
        ("=> 1", None),
        ("p50 >= 0.9 or so", None),
        ("p50 >= nan", None),
        ("p50 >= 1e999", None),
        ("", None),
        (">=", None),
    ],
)
def test_grammar(text: str, expected: tuple[str | None, str, float] | None) -> None:
    if expected is None:
        with pytest.raises(ScenarioError) as caught:
            parse("overlap.balancer", text)
        assert caught.value.code == "E035"
    else:
        assert parse("overlap.balancer", text) == Threshold("overlap.balancer", *expected)


def test_an_unknown_metric_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ScenarioError) as caught:
        parse("balancednes.min", "> 0")
    assert (caught.value.code, caught.value.hint) == ("E036", "did you mean 'balancedness.min'?")


def test_a_single_number_takes_no_aggregate() -> None:
    with pytest.raises(ScenarioError) as caught:
        parse("commits", "p95 >= 3")
    assert caught.value.code == "E035"
    assert "write '>= 3'" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "values", "expected"),
    [
        ("p50 >= 2", [1, 2, 9], (2.0, True)),
        ("mean > 4", [1, 2, 9], (4.0, False)),
        ("min >= 1", [1, 2, 9], (1.0, True)),
        ("max < 9", [1, 2, 9], (9.0, False)),
        ("p99 <= 9", [1, 2, 9], (8.86, True)),
        (">= 2", [3, 2, 9], (2.0, True)),
        (">= 2", [3, 1, 0], (1.0, False)),
        ("<= 9", [3, 8, 2], (8.0, True)),
        ("!= 0", [1, 0], (0.0, False)),
        ("== 5", [5], (5.0, True)),
    ],
)
def test_judging(text: str, values: list[float], expected: tuple[float, bool]) -> None:
    seen, holds = parse("balancedness.min", text).judge(values)
    assert (seen, holds) == (pytest.approx(expected[0]), expected[1])


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_missing_values_are_unknown_and_never_a_pass(values: list[float]) -> None:
    assert parse("balancedness.min", ">= 0").judge(values) == (None, None)


def test_a_threshold_prints_as_it_is_written() -> None:
    parsed = parse_all({"overlap.balancer": "p50>=0.90", "commits": "> 3"})
    assert [str(threshold) for threshold in parsed] == ["overlap.balancer p50 >= 0.9", "commits > 3"]
