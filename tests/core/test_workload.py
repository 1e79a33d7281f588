from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_eplb.core import scenario as scenarios
from moe_eplb.core import workload
from moe_eplb.core.scenario import Scenario


def make(work: str, *, experts: int = 16, top_k: int = 4, ranks: int = 2, seed: int = 0) -> Scenario:
    text = (
        f"{{ranks: {ranks}, seed: {seed}, model: {{layers: 2, experts: {experts}, top_k: {top_k}}}, workload: {work}}}"
    )
    return scenarios.loads(text, "test.yaml")


def counts(scenario: Scenario, iteration: int = 0, layer: int = 0) -> np.ndarray:
    ids = workload.topk_ids(scenario, iteration, layer, 0)
    assert ids is not None
    return np.bincount(ids.ravel(), minlength=scenario.model.experts)


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(["uniform", "zipf", "hot"]),
    experts=st.integers(1, 40),
    data=st.data(),
    place=st.tuples(st.integers(0, 50), st.integers(0, 1), st.integers(0, 1)),
)
def test_each_token_gets_distinct_experts(
    kind: str, experts: int, data: st.DataObject, place: tuple[int, int, int]
) -> None:
    top_k = data.draw(st.integers(1, experts))
    scenario = make(f"{{kind: {kind}, tokens_per_rank: 7}}", experts=experts, top_k=top_k)
    ids = workload.topk_ids(scenario, *place)
    assert ids is not None
    assert ids.shape == (7, top_k)
    assert ids.dtype == np.int32
    assert ids.flags.c_contiguous
    assert 0 <= ids.min() <= ids.max() < experts
    assert all(len(set(row)) == top_k for row in ids.tolist())


def test_ids_depend_on_everything_they_should_and_on_nothing_else() -> None:
    scenario = make("{kind: zipf, tokens_per_rank: 32}")
    base = workload.topk_ids(scenario, 3, 1, 0)
    other_seed = make("{kind: zipf, tokens_per_rank: 32}", seed=1)
    assert np.array_equal(base, workload.topk_ids(scenario, 3, 1, 0))
    for changed in (
        workload.topk_ids(scenario, 4, 1, 0),
        workload.topk_ids(scenario, 3, 0, 0),
        workload.topk_ids(scenario, 3, 1, 1),
        workload.topk_ids(other_seed, 3, 1, 0),
    ):
        assert not np.array_equal(base, changed)


def test_another_process_draws_the_same_ids() -> None:
    program = (
        "from moe_eplb.core import scenario, workload\n"
        "s = scenario.loads('{ranks: 2, model: {layers: 2, experts: 16, top_k: 4}, workload: {kind: zipf}}', 'x')\n"
        "print(workload.topk_ids(s, 3, 1, 1).tolist())"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60, cwd=Path.cwd()
    )
    ids = workload.topk_ids(make("{kind: zipf}"), 3, 1, 1)
    assert ids is not None
    assert answer.stdout.strip() == str(ids.tolist())


def test_hot_experts_get_their_share() -> None:
    scenario = make("{kind: hot, tokens_per_rank: 4000, hot_experts: 2, hot_share: 0.6}", experts=32, top_k=1)
    shares = np.sort(counts(scenario))[::-1] / 4000
    assert shares[:2].sum() == pytest.approx(0.6, abs=0.03)
    assert shares[2:].max() < 0.03


def test_zipf_falls_with_the_rank_and_uniform_does_not() -> None:
    zipf = np.sort(counts(make("{kind: zipf, tokens_per_rank: 4000}", top_k=1)))[::-1] / 4000
    flat = counts(make("{kind: uniform, tokens_per_rank: 4000}", top_k=1)) / 4000
    harmonic = (1 / np.arange(1, 17)).sum()
    assert zipf[:4] == pytest.approx(1 / np.arange(1, 5) / harmonic, abs=0.03)
    assert flat == pytest.approx(1 / 16, abs=0.02)


def test_steep_weights_still_give_distinct_experts() -> None:
    scenario = make("{kind: zipf, tokens_per_rank: 50, skew: 16}", experts=512, top_k=8)
    ids = workload.topk_ids(scenario, 0, 0, 0)
    assert ids is not None
    assert all(len(set(row)) == 8 for row in ids.tolist())


def test_drift_changes_the_hot_experts_only_at_its_iterations() -> None:
    scenario = make("{kind: zipf, drift_every: 3}")
    weights = [workload.expert_weights(scenario, iteration, 0) for iteration in range(6)]
    same = [np.array_equal(a, b) for a, b in itertools.pairwise(weights)]
    assert same == [True, True, False, True, True]
    assert np.array_equal(np.sort(weights[0]), np.sort(weights[3]))


def test_layers_have_different_hot_experts() -> None:
    scenario = make("{kind: zipf}")
    assert not np.array_equal(workload.expert_weights(scenario, 0, 0), workload.expert_weights(scenario, 0, 1))


def test_tokens_may_differ_between_ranks_and_be_none() -> None:
    scenario = make("{kind: uniform, tokens_per_rank: [3, 0]}")
    assert [workload.tokens(scenario, 0, rank) for rank in range(2)] == [3, 0]
    ids = workload.topk_ids(scenario, 0, 0, 1)
    assert ids is not None
    assert ids.shape == (0, 4)


def test_a_model_chooses_for_itself() -> None:
    assert workload.topk_ids(make("{kind: model}"), 0, 0, 0) is None


def test_recorded_ids_are_dealt_in_order(tmp_path: Path) -> None:
    ids = np.stack([np.stack([np.arange(t, t + 4) % 16] * 2) for t in range(20)]).astype(np.uint8)
    np.savez(tmp_path / "ids.npz", topk_ids=ids)
    scenario = make(f"{{kind: recorded, tokens_per_rank: [3, 2], path: {tmp_path / 'ids.npz'}}}")
    assert np.array_equal(workload.topk_ids(scenario, 2, 1, 0), ids[10:13, 1])
    assert np.array_equal(workload.topk_ids(scenario, 2, 1, 1), ids[13:15, 1])


def test_recorded_counts_drive_the_draw_window_by_window(tmp_path: Path) -> None:
    windows = np.zeros((2, 2, 16), dtype=np.int64)
    windows[0, :, :2], windows[1, :, 4:6] = [30, 10], [10, 30]
    np.savez(tmp_path / "counts.npz", counts=windows)
    scenario = make(f"{{kind: recorded, tokens_per_rank: 2000, path: {tmp_path / 'counts.npz'}}}", top_k=1)
    for iteration in range(3):
        share = counts(scenario, iteration) / 2000
        assert share == pytest.approx(windows[iteration % 2, 0] / 40, abs=0.04)


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "ids.npz"
    seen = []
    for first in (0, 1):
        np.savez(path, topk_ids=np.full((4, 2, 1), first, dtype=np.uint8))
        os.utime(path, ns=(first, first))
        ids = workload.topk_ids(make(f"{{kind: recorded, tokens_per_rank: 2, path: {path}}}", top_k=1), 0, 0, 0)
        assert ids is not None
        seen.append(int(ids[0, 0]))
    assert seen == [0, 1]
