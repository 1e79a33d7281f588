"""Small scenario files, and a session that gives planned verdicts instead of starting ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import eplbctl.cli
from moe_eplb.core import scenario as scenarios
from moe_eplb.core.errors import EplbError
from moe_eplb.core.evidence import EvidenceWriter, Row
from moe_eplb.core.scenario import Scenario
from moe_eplb.core.verdict import CheckResult, Status, Verdict
from moe_eplb.session import Progress, RunResult

SMALL = """\
description: a small one
ranks: 2
iterations: 4
model: {layers: 2, experts: 4, top_k: 2, hidden: 16, intermediate: 8}
workload: {kind: zipf, tokens_per_rank: 8}
balancer: {slots_per_rank: 3, layer_updates_per_iter: 1}
"""

VALID = CheckResult("equality", Status.VALID, "ratio 0.1", "ratio <= 1")
INVALID = CheckResult(
    "exactly_once", Status.INVALID, "3 missing", "0 missing", "rank 1, token 7", "layer 1, iteration 2"
)
UNKNOWN = CheckResult("stream_join", Status.UNKNOWN, "no trace", "a trace")


def verdict_of(*checks: CheckResult, failure: str = "") -> Verdict:
    """A verdict of a scenario whose name does not matter."""
    return Verdict("any", checks, failure=failure)


@dataclass
class FakeSession:
    """What scenarios shall end with by name (valid unless said), and what was run."""

    planned: dict[str, Verdict | EplbError | KeyboardInterrupt] = field(default_factory=dict)
    ran: list[tuple[Scenario, Path]] = field(default_factory=list)
    argv: list[tuple[str, ...]] = field(default_factory=list)
    digest: int = 5

    def __enter__(self) -> FakeSession:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def close(self) -> None:
        """No rank has been started."""

    def run(
        self, scenario: Scenario, folder: Path, *, progress: Progress | None = None, argv: Sequence[str] = ()
    ) -> RunResult:
        """Leave a run folder with one placement and give the planned verdict."""
        self.ran.append((scenario, folder))
        self.argv.append(tuple(argv))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "scenario.yaml").write_text(scenarios.dump(scenario))
        (folder / "meta.json").write_text(json.dumps({"seed": scenario.seed}))
        writer = EvidenceWriter(folder / "evidence.rank0.jsonl", 0)
        writer.write(Row.PLACEMENT, 0, 0, digest=self.digest, slots=[0, 1, 2, 3, 0, 1])
        writer.close()
        if progress is not None:
            for done in range(1, scenario.iterations + 1):
                progress(done, scenario.iterations)
        planned = self.planned.get(scenario.name, verdict_of(VALID))
        if isinstance(planned, BaseException):
            raise planned
        return RunResult(folder, planned, 1.5)


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every command runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> FakeSession:
    """Replaces the pool of ranks."""
    fake = FakeSession()
    monkeypatch.setattr("moe_eplb.session.RankPool", lambda: fake)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    return fake


@dataclass(frozen=True)
class Answer:
    """What a command line gave."""

    code: int
    out: str
    err: str


Call = Callable[..., Answer]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run ``eplbctl`` in this process."""

    def run(*arguments: object) -> Answer:
        capsys.readouterr()
        code = eplbctl.cli.invoke([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return run


Write = Callable[..., Path]


@pytest.fixture
def write() -> Write:
    """Write a small scenario file below scenarios/."""

    def make(name: str = "small", text: str = SMALL) -> Path:
        path = Path("scenarios") / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return make
