"""Every shipped scenario, damaged at random: it is still accepted, or refused with one error, and in time.

By hand with more examples: HOSTILE_EXAMPLES=100 pytest tests/cli/test_hostile_mutations.py
"""

from __future__ import annotations

import contextlib
import io
import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import eplbctl.cli
from moe_eplb.core import scenario as scenarios
from moe_eplb.core.errors import EplbError, ExitCode, ScenarioError
from moe_eplb.core.scenario import Scenario
from moe_eplb.session import RankPool
from tests.support import mutations

ROOT = Path(__file__).parents[2] / "scenarios"
PATHS = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.yaml") if "data" not in path.parts)
BY_HAND = "HOSTILE_EXAMPLES" in os.environ
EXAMPLES = int(os.environ.get("HOSTILE_EXAMPLES", "3"))
SECONDS = 1.0
"""Of the processor, since other programs may keep it from this one."""

hostile = settings(
    max_examples=EXAMPLES, derandomize=not BY_HAND, database=None, deadline=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that scenarios name, where damaged scenarios find them."""
    folder = tmp_path_factory.mktemp("shipped")
    (folder / "data").symlink_to(ROOT / "data")
    for path in PATHS:
        (folder / path).parent.mkdir(exist_ok=True)
    return folder


def check(path: Path) -> tuple[int, str]:
    """Exit code and errors of ``eplbctl scenario check`` on a file, which may take so long and no longer."""
    out, err = io.StringIO(), io.StringIO()
    before = time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = eplbctl.cli.invoke(["scenario", "check", str(path)])
    assert time.process_time() - before < SECONDS
    return code, err.getvalue()


def assert_accepted_or_refused(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="")
    code, err = check(path)
    if code == ExitCode.VALID:
        assert err == ""
        loaded = scenarios.load(path)
        assert scenarios.loads(scenarios.dump(loaded), "again") == loaded
    else:
        assert code == ExitCode.USAGE, err
        assert err.startswith("error[E"), err
        assert err.count("error[") == 1


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_damaged_structure_is_accepted_or_refused(path: Path, shipped: Path) -> None:
    @hostile
    @given(mutations.structure((ROOT / path).read_text()))
    def damaged(text: str) -> None:
        assert_accepted_or_refused(shipped / path, text)

    damaged()


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_damaged_text_is_accepted_or_refused(path: Path, shipped: Path) -> None:
    @hostile
    @given(mutations.text((ROOT / path).read_text()))
    def damaged(text: str) -> None:
        assert_accepted_or_refused(shipped / path, text)

    damaged()


CLAMPS = {
    "iterations": 3, "ranks": 2, "timeout_s": 20.0, "model.layers": 3, "model.experts": 16, "model.hidden": 64,
    "model.intermediate": 64, "model.shared_intermediate": 64, "workload.prompt_tokens": 4,
    "balancer.num_slots": 64, "balancer.slots_per_rank": 32, "balancer.update_timeout_s": 5.0,
}  # fmt: skip


def clamped(scenario: Scenario) -> list[str]:
    """Overrides that make a scenario small enough to run in a moment."""
    data = scenario.model_dump(exclude_none=True)
    found = []
    for name, most in CLAMPS.items():
        *section, key = name.split(".")
        inner = data.get(section[0], {}) if section else data
        if inner.get(key, 0) > most:
            found.append(f"{name}={most}")
    tokens = scenario.workload.tokens_per_rank
    few = [min(t, 8) for t in tokens][:2] if isinstance(tokens, tuple) else min(tokens, 8)
    return [*found, f"workload.tokens_per_rank={few}"]


def runnable(text: str, path: Path) -> Scenario:
    """The clamped scenario of a damaged text; the example is no use when there is none."""
    try:
        accepted = scenarios.loads(text, str(path))
        small = scenarios.loads(text, str(path), clamped(accepted))
        path.write_text(scenarios.dump(small), encoding="utf-8")
        small = scenarios.load(path)
    except ScenarioError:
        assume(False)
    assume(small.model.part != "whole")  # which imports for seconds
    return small


def test_a_damaged_scenario_that_is_accepted_runs_to_a_verdict(shipped: Path, tmp_path: Path) -> None:
    sources = st.sampled_from([(path, (ROOT / path).read_text()) for path in PATHS])
    ran: list[str] = []

    @settings(hostile, max_examples=12 * EXAMPLES)
    @given(sources.flatmap(lambda s: st.tuples(st.just(s[0]), mutations.structure(s[1]) | mutations.text(s[1]))))
    def damaged(drawn: tuple[Path, str]) -> None:
        path, text = drawn
        scenario = runnable(text, shipped / path)
        folder = tmp_path / str(len(ran))
        ran.append(text)
        try:
            result = pool.run(scenario, folder)
        except EplbError:
            return
        assert "Traceback" not in result.verdict.failure, result.verdict.failure
        assert result.exit_code in (ExitCode.VALID, ExitCode.INVALID, ExitCode.UNKNOWN, ExitCode.FAILED)

    with RankPool() as pool:
        pool.reserve(2)
        damaged()
    assert len(ran) >= 10
