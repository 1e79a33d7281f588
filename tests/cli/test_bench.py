"""``eplbctl bench``: variants of a scenario, timed by real ranks in turns, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_eplb.session.bench import _order
from moe_eplb.session.samples import read_samples, samples_path

from .conftest import Call, Write

ROOT = Path(__file__).parents[2]
FEW = ("--rounds", "3", "--steps", "4", "--warm-up", "1")


def test_real_ranks_are_timed_and_every_sample_is_kept(call: Call, write: Write) -> None:
    path = str(write("small"))
    done = call("bench", path, "--compare", "balancer.state=host,device", *FEW, "--format", "json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["rounds"], found["steps"], found["ranks"], found["device"]) == (3, 4, 2, {"kind": "cpu"})
    assert [v["variant"] for v in found["variants"]] == ["balancer.state=host", "balancer.state=device"]
    for variant in found["variants"]:
        assert [len(steps) for steps in variant["samples_ms"]] == [4, 4, 4]
        assert all(0.0 < ms < 10_000 for steps in variant["samples_ms"] for ms in steps)
        assert variant["low"] <= variant["ratio"] <= variant["high"]
        assert variant["median_ms"] <= variant["p99_ms"]
    assert found["variants"][0]["ratio"] == found["variants"][0]["step_ratio"] == 1.0
    assert [(v["statistics"], v["execution"]) for v in found["variants"]] == [("gathered", "eager")] * 2
    assert "torch" in found["versions"]


def test_a_variant_that_does_more_is_slower_and_the_table_says_so(call: Call, write: Write) -> None:
    path = str(write("small"))
    done = call("bench", path, "--compare", "model.layers=1,8", "--set", "balancer.commit_delay=2", *FEW)
    assert done.code == 0, done.err
    rows = [line.split() for line in done.out.splitlines() if line.startswith("model.layers=")]
    assert [row[0] for row in rows] == ["model.layers=1", "model.layers=8"]
    assert float(rows[1][5]) > 2.0


def test_the_choreographies_are_compared_with_the_statistics_of_each(call: Call, write: Write) -> None:
    path, compare = str(write("small")), "overlap=serial,before,after"
    done = call("bench", path, "--compare", compare, "--set", "dispatch=allgather", *FEW)
    assert done.code == 0, done.err
    rows = [line.split() for line in done.out.splitlines() if line.startswith("overlap=")]
    assert [row[:3] for row in rows] == [
        ["overlap=serial", "local_ids", "12"],
        ["overlap=before", "global_ids", "12"],
        ["overlap=after", "local_ids", "12"],
    ]
    assert all(float(row[6]) <= float(row[5]) <= float(row[8]) for row in rows), "an interval holds its ratio"
    assert all(float(row[10]) <= float(row[9]) <= float(row[12]) for row in rows)
    assert rows[0][5] == rows[0][9] == "1.000"
    refused = call("bench", path, "--compare", compare)
    assert refused.code == 2
    assert "dispatch: allgather" in refused.err


@pytest.mark.parametrize(
    ("compare", "text"),
    [
        ("overlap", "does not parse"),
        ("overlap=after", "does not parse"),
        ("=a,b", "does not parse"),
        ("overlap=after,", "does not parse"),
        ("overlap=after,never", "override 'overlap=never'"),
        ("nonsense=1,2", "nonsense"),
        ("ranks=2,4", "share their ranks"),
    ],
)
def test_bad_comparisons_are_refused(call: Call, write: Write, compare: str, text: str) -> None:
    done = call("bench", str(write("small")), "--compare", compare)
    assert done.code == 2
    assert text in done.err
    assert "Traceback" not in done.err


def test_rounds_go_forward_and_backward() -> None:
    assert [list(_order(3, index)) for index in range(3)] == [[0, 1, 2], [2, 1, 0], [0, 1, 2]]


def test_a_step_takes_as_long_as_its_slowest_rank(tmp_path: Path) -> None:
    samples = [[[[1.0, 5.0]], [[2.0, 2.0]]], [[[3.0, 4.0]], [[1.0, 9.0]]]]
    for rank, found in enumerate(samples):
        samples_path(tmp_path, rank).write_text(json.dumps({"samples_ms": found, "device": {"kind": "cpu"}}))
    assert read_samples(tmp_path, 2) == ([[[3.0, 5.0]], [[2.0, 9.0]]], {"kind": "cpu"})


# -- what balancing wins back -----------------------------------------------------------------------------------------

HOT = (
    "--set", "workload={kind: hot_rank, tokens_per_rank: 512, hot_rank: 1, hot_share: 0.95}",
    "--set", "model={layers: 2, experts: 16, top_k: 4, hidden: 256, intermediate: 512}",
    "--set", "balancer.slots_per_rank=10",
)  # fmt: skip


def test_the_gain_of_a_hot_rank_is_told_with_its_parts(call: Call, write: Write) -> None:
    done = call("bench", str(write("small")), "--gain", *HOT, "--rounds", "3", "--steps", "5", "--format", "json")
    found = json.loads(done.out)
    gain = found["gain"]
    assert found["variants"][0]["statistics"] == "none"
    assert [v["variant"] for v in found["variants"]] == ["static", "dynamic", "balanced"]
    sums = [sum(map(sum, v["samples_ms"])) for v in found["variants"]]
    assert [gain["static_ms"], gain["dynamic_ms"], gain["balanced_ms"]] == pytest.approx(sums)
    assert gain["cost"] == pytest.approx(sums[0] / sums[2])
    assert gain["share"] == pytest.approx((sums[0] - sums[1]) / (sums[0] - sums[2]))
    assert (found["warm_up"], found["rehearsal"]) == (0, 3), "the clock begins with the first iteration"
    assert gain["tells"] == (gain["cost"] >= 1.3)
    assert done.code == (0 if gain["tells"] else 3)


def test_the_gain_of_a_balancer_file_is_measured_too(call: Call) -> None:
    path = ROOT / "scenarios" / "tensorrt_llm_config.yaml"
    done = call("bench", path, "--gain", "--rounds", "2", "--steps", "3", "--format", "json")
    assert done.err.count("error") == 0
    found = json.loads(done.out)
    assert [v["variant"] for v in found["variants"]] == ["static", "dynamic", "balanced"]
    assert done.code == (0 if found["gain"]["tells"] else 3)


def test_no_gain_is_told_where_imbalance_costs_nothing(
    call: Call, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given the times: those that a few steps take on a busy machine differ by more than imbalance costs."""
    times = [[[each] * 4] * 2 for each in (11.6, 10.1, 10.0)]
    monkeypatch.setattr("moe_eplb.session.samples.read_samples", lambda folder, ranks: (times, {"kind": "cpu"}))
    done = call("bench", str(write("small")), "--gain", "--set", "workload.kind=balanced", "--rounds", "2", *FEW[2:4])
    assert done.code == 3
    assert "gain: unknown, since imbalance costs too little here" in done.out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "give either --compare or --gain"),
        (("--gain", "--compare", "overlap=serial,after"), "give either --compare or --gain"),
        (("--gain", "--set", "balancer.layer_updates_per_iter=0"), "no gain without moves"),
        (("--gain", "--set", "workload.kind=uniform"), "cannot be held against uniform routing"),
    ],
)
def test_what_has_no_gain_is_refused(call: Call, write: Write, arguments: tuple[str, ...], text: str) -> None:
    done = call("bench", str(write("small")), *arguments)
    assert done.code == 2
    assert text in done.err
    assert "Traceback" not in done.err
