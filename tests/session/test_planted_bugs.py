"""Breaking it is noticed: each planted bug turns the verdict invalid by the check that is meant for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PLANTED = Path(__file__).parent / "planted"

BASE = """\
# Two ranks, three layers, experts moving in every iteration.
name: planted
ranks: 2
seed: 11
iterations: 6
timeout_s: 60
balancer: {num_slots: 24, layer_updates_per_iter: 3, empty_group: never}
"""
SKEWED = "workload: {kind: zipf, tokens_per_rank: [32, 5], skew: 1.2, drift_every: 2}\n"
SIZES = "model: {layers: 3, experts: 16, top_k: 2, hidden: 16, intermediate: 16}\n"
PLAIN = SKEWED + SIZES
LARGE = (
    SKEWED
    + """\
model:
  {layers: 3, experts: 16, top_k: 2, hidden: 16, intermediate: 16, shared_intermediate: 32, repeated_layers: {1: 2}}
moe_max_num_tokens: 6
"""
)
# An odd number of chunks: the last one is not on the caller's stream, which would imply a join of the others.
FP8 = SKEWED + SIZES.replace("}", ", dtype: float8_e4m3fn}") + "dispatch: alltoall\n"
TWICE = SKEWED + SIZES.replace("}", ", repeated_layers: {0: 2, 1: 2, 2: 2}}") + "dispatch: alltoall\n"
ROUTED = SIZES + "workload: {kind: model, tokens_per_rank: [32, 5]}\n"
PATHS = {
    "gathered": PLAIN + "dispatch: alltoall\n",
    "local_ids": PLAIN + "dispatch: allgather\n",
    "global_ids": PLAIN + "dispatch: allgather\nstatistics: global_ids\n",
    "state_on_device": PLAIN + "dispatch: alltoall\n",
    "peers_state_on_device": PLAIN + "dispatch: alltoall\n",
    "fp8": FP8,
    "fp8_state_on_device": FP8,
    "before": PLAIN + "dispatch: allgather\noverlap: before\n",
    "chunked_before": LARGE + "dispatch: allgather\noverlap: before\n",
    "routed": ROUTED + "dispatch: alltoall\n",
    "twice": TWICE,
    "chunked": LARGE + "dispatch: alltoall\n",
    "chunked_local_ids": LARGE + "dispatch: allgather\n",
    "local_ids_state_on_device": PLAIN + "dispatch: allgather\n",
    "one_reduction_state_on_device": PLAIN + "dispatch: allgather\n",
    "gated": PLAIN + "dispatch: alltoall\n",
    "chunked_global_ids": LARGE + "dispatch: allgather\nstatistics: global_ids\n",
}
# bug -> (the check meant for it, statistics path of the run that it is planted in)
MEANT_FOR = {
    "stale_weight": ("attestation", "gathered"),
    "slot_table_off_by_one": ("exactly_once", "gathered"),
    "late_commit": ("agreement", "gathered"),
    "replica_chosen_by_receiver": ("exactly_once", "global_ids"),
    "statistics_never_reduced": ("statistics", "local_ids"),
    "missing_stream_join": ("stream_join", "local_ids"),
    "wrong_axis_balancedness": ("balancedness", "gathered"),
    "updates_silently_off": ("effect", "gathered"),
    "digest_disagreement": ("agreement", "local_ids"),
    "load_never_zeroed": ("effect", "gathered"),
    "other_experts_than_asked": ("run_complete", "local_ids"),
    "chunk_reads_without_waiting": ("stream_join", "chunked"),
    "hand_over_while_a_chunk_reads": ("stream_join", "chunked_local_ids"),
    "chunk_result_used_early": ("stream_join", "chunked"),
    "empty_chunk_counted_again": ("statistics", "chunked"),
    "padding_counted": ("statistics", "chunked_global_ids"),
    "shared_expert_of_other_tokens": ("equality", "chunked_local_ids"),
    "shared_expert_not_added": ("equality", "chunked_local_ids"),
    "scales_in_other_order": ("equality", "gathered"),
    "second_best_expert": ("equality", "routed"),
    "tables_without_cells": ("attestation", "state_on_device"),
    "every_vote_counts_as_yes": ("agreement", "state_on_device"),
    "device_keeps_its_load": ("effect", "state_on_device"),
    "scales_stay_behind": ("attestation", "fp8"),
    "scales_stay_behind_in_cells": ("attestation", "fp8_state_on_device"),
    "peer_reads_the_first_cells": ("attestation", "peers_state_on_device"),
    "peers_asked_for_and_the_host_taken": ("effect", "peers_state_on_device"),
    "older_wait_not_joined": ("stream_join", "before"),
    "older_statistics_not_joined": ("stream_join", "before"),
    "vote_without_the_route_that_counts": ("stream_join", "local_ids_state_on_device"),
    "held_vote_without_the_route_that_counts": ("stream_join", "local_ids_state_on_device"),
    "one_layer_left_out_of_the_sum": ("statistics", "one_reduction_state_on_device"),
    "loads_from_before_the_sum": ("effect", "one_reduction_state_on_device"),
    "moves_that_do_not_pay": ("effect", "gated"),
    "tables_change_between_forwards": ("effect", "twice"),
    "leaked_segment": ("leaks", "gathered"),
}


def run(folder: Path, path: str, bug: str | None) -> tuple[int, dict[str, Any]]:
    """Exit code and verdict of the scenario, with or without a planted bug."""
    scenario = folder / "planted.yaml"
    state = "device" if path.endswith("state_on_device") else "host"
    source = "peer" if path.startswith("peers_") else "host"
    one_sum = ", reduction: iteration, commit_delay: 2" if path.startswith("one_reduction_") else ""
    gate = ", min_gain: 0.3" if path == "gated" else ""
    settings = f"never, state: {state}, weights_from: {source}{one_sum}{gate}}}"
    scenario.write_text(BASE.replace("never}", settings) + PATHS[path])
    environment = os.environ | {"PYTHONPATH": f"{PLANTED}{os.pathsep}{ROOT}"}
    environment.pop("PLANTED_BUG", None)
    if bug is not None:
        environment["PLANTED_BUG"] = bug
    command = [sys.executable, "-m", "eplbctl", "run", str(scenario), "--out", str(folder / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    verdict_file = folder / "run" / "verdict.json"
    assert verdict_file.exists(), f"no verdict, exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.returncode, json.loads(verdict_file.read_text())


@pytest.mark.parametrize("path", list(PATHS))
def test_the_clean_twin_is_valid(path: str, tmp_path: Path) -> None:
    code, verdict = run(tmp_path, path, bug=None)
    assert (code, verdict["status"], verdict["failure"]) == (0, "valid", ""), verdict["checks"]


@pytest.mark.parametrize("bug", list(MEANT_FOR))
def test_a_planted_bug_is_found_by_its_check(bug: str, tmp_path: Path) -> None:
    check, path = MEANT_FOR[bug]
    code, verdict = run(tmp_path, path, bug)
    status = {c["name"]: c["status"] for c in verdict["checks"]}
    assert verdict["failure"] == "", "the run crashed: that is no finding"
    assert (code, verdict["status"]) == (1, "invalid")
    assert status[check] == "invalid", status


def test_every_bug_has_its_check() -> None:
    sys.path.insert(0, str(PLANTED))
    try:
        from planted_bugs import BUGS
    finally:
        sys.path.remove(str(PLANTED))
    assert set(BUGS) == set(MEANT_FOR)
