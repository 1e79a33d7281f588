"""The run folder: what is written before the ranks start and after they have ended."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from moe_eplb.analysis.verdict import judge
from moe_eplb.core import scenario as scenarios
from moe_eplb.core.errors import UsageError
from moe_eplb.core.evidence import Row, read_evidence
from moe_eplb.core.scenario import Scenario
from moe_eplb.core.verdict import CheckResult, Status, Verdict
from moe_eplb.recording.export import write_trace

__all__ = ["close_folder", "events_path", "evidence_path", "open_folder"]

_ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "WORLD_SIZE")
"""The only environment variables that a run folder keeps: others may hold secrets."""
_PACKAGES = ("click", "numpy", "nvtx", "pydantic", "pyyaml", "tabulate", "torch")


def events_path(folder: Path, rank: int) -> Path:
    """Event log of a rank."""
    return folder / f"events.rank{rank}.bin"


def evidence_path(folder: Path, rank: int) -> Path:
    """Evidence of a rank."""
    return folder / f"evidence.rank{rank}.jsonl"


def open_folder(folder: Path, scenario: Scenario, *, launcher: str, argv: Sequence[str]) -> None:
    """Make the folder with the resolved scenario and where the run comes from. It must not hold a run already."""
    if (folder / "meta.json").exists():
        raise UsageError("E011", f"{folder} already holds a run", hint="choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scenario.yaml").write_text(scenarios.dump(scenario), encoding="utf-8")
    meta = {
        "tool": "moe_eplb",
        "versions": _versions(),
        "git": _git_hash(),
        "seed": scenario.seed,
        "ranks": scenario.ranks,
        "argv": list(argv),
        "env": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        "launcher": launcher,
        "recorder": "builtin",
        "started_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "state": "running",
        "failure": "",
    }
    _write_json(folder / "meta.json", meta)


def close_folder(folder: Path, scenario: Scenario, *, failure: str = "") -> Verdict:
    """Write the trace, the loads, the run's end and the verdict."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    meta |= {"state": "failed" if failure else "finished", "failure": failure}
    _write_json(folder / "meta.json", meta)
    verdict = _judge(folder, scenario, failure)
    _write_json(folder / "verdict.json", verdict.to_json())
    return verdict


def _judge(folder: Path, scenario: Scenario, failure: str) -> Verdict:
    if failure and not any(events_path(folder, rank).exists() for rank in range(scenario.ranks)):
        nothing = CheckResult("run_complete", Status.UNKNOWN, "no rank started", f"{scenario.ranks} ranks")
        return Verdict(scenario.name, (nothing,), failure=failure)
    write_trace(folder)
    if not failure and scenario.calls is None:
        _write_loads(folder, scenario)
    return judge(folder)


def _write_loads(folder: Path, scenario: Scenario) -> None:
    """Counts per expert, and every chosen id where the scenario asks for it, as a `recorded` workload reads them."""
    if scenario.record.loads:
        shape = (scenario.iterations, scenario.model.layers, scenario.model.experts)
        counts = np.zeros(shape, dtype=np.int64)
        for rank in range(scenario.ranks):
            for row in read_evidence(evidence_path(folder, rank)):
                if row["row"] == Row.ROUTED:
                    counts[row["iteration"], row["layer"]] += np.asarray(row["counts"])
        np.savez_compressed(folder / "loads.npz", counts=counts)
    if scenario.record.topk_ids:
        _merge_topk_ids(folder, scenario)


def _merge_topk_ids(folder: Path, scenario: Scenario) -> None:
    """One file of all ranks' ids: a recorded workload deals tokens iteration by iteration, within one rank by rank."""
    parts = [folder / f"topk_ids.rank{rank}.npz" for rank in range(scenario.ranks)]
    steps: list[list[np.ndarray]] = []
    for part in parts:
        with np.load(part) as file:
            steps.append(np.split(file["topk_ids"], np.cumsum(file["tokens"])[:-1]))
    ids = np.concatenate([step for iteration in zip(*steps, strict=True) for step in iteration])
    np.savez_compressed(folder / "topk_ids.npz", topk_ids=ids, num_experts=np.int64(scenario.model.experts))
    for part in parts:
        part.unlink()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        found[name] = metadata.version(name)
    return found


def _git_hash() -> str:
    """Commit of the source tree this package is imported from, or "" outside one."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def _write_json(path: Path, data: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
