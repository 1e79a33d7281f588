"""The run folder: what is written before the ranks start and after they have ended."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import platform
import sqlite3
import subprocess
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np

from moe_eplb.analysis.verdict import judge
from moe_eplb.core import scenario as scenarios
from moe_eplb.core.errors import RunFailed, TraceError, UsageError
from moe_eplb.core.evidence import Row, read_evidence
from moe_eplb.core.scenario import Scenario
from moe_eplb.core.verdict import CheckResult, Status, Verdict
from moe_eplb.recording.export import write_trace

__all__ = ["close_folder", "events_path", "evidence_path", "open_folder", "versions"]

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
    """Make the folder with the resolved scenario and where the run comes from.

    Raises:
        UsageError: E011 it holds a run already, perhaps one that has just begun; E015 it cannot be made.
        RunFailed: E183 it cannot be written.
    """
    if (folder / "meta.json").exists():
        raise _taken(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError("E015", f"{folder} cannot be a run folder", why=error.strerror or str(error)) from error
    text = scenarios.dump(scenario)
    with _writing(folder):
        _claim(folder, text)
        _write_json(folder / "meta.json", _provenance(scenario, text, launcher, argv))


def _claim(folder: Path, text: str) -> None:
    """Of several runs that are told to use one folder at the same moment, one gets to create its scenario."""
    try:
        file = (folder / "scenario.yaml").open("x", encoding="utf-8")
    except FileExistsError as error:
        raise _taken(folder) from error
    with file:
        try:
            file.write(text)
            file.flush()
        except OSError:
            (folder / "scenario.yaml").unlink()
            raise


def _taken(folder: Path) -> UsageError:
    return UsageError("E011", f"{folder} already holds a run", hint="choose another folder")


def _provenance(scenario: Scenario, text: str, launcher: str, argv: Sequence[str]) -> dict[str, Any]:
    return {
        "tool": "moe_eplb",
        "versions": versions(),
        "git": _git_hash(),
        "scenario_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "seed": scenario.seed,
        "ranks": scenario.ranks,
        "argv": list(argv),
        "env": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        "launcher": launcher,
        "recorder": scenario.record.recorder,
        "started_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "state": "running",
        "failure": "",
    }


def close_folder(folder: Path, scenario: Scenario, *, failure: str = "") -> Verdict:
    """Write the trace, the loads, the run's end and the verdict; RunFailed E183 when they cannot be written."""
    with _writing(folder):
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        meta |= {"state": "failed" if failure else "finished", "failure": failure}
        _write_json(folder / "meta.json", meta)
        verdict = _judge(folder, scenario, failure)
        _write_json(folder / "verdict.json", verdict.to_json())
    return verdict


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """A full disk, or a folder that somebody has taken away, is a failure of the run."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise RunFailed("E183", "the run folder could not be written", why=why, where=str(folder)) from error


def _judge(folder: Path, scenario: Scenario, failure: str) -> Verdict:
    if failure and not any(events_path(folder, rank).exists() for rank in range(scenario.ranks)):
        nothing = CheckResult("run_complete", Status.UNKNOWN, "no rank started", f"{scenario.ranks} ranks")
        return Verdict(scenario.name, (nothing,), failure=failure)
    try:
        write_trace(folder)
        if not failure and scenario.calls is None:
            _write_loads(folder, scenario)
        return judge(folder)
    except TraceError as error:
        # A rank that died while it made its log leaves half of one; that must not hide why it died.
        if not failure:
            raise
        failure = f"{failure}\n{error}"
        nothing = CheckResult("run_complete", Status.UNKNOWN, "a rank's log is damaged", f"{scenario.ranks} ranks")
        return Verdict(scenario.name, (nothing,), failure=failure)


def _write_loads(folder: Path, scenario: Scenario) -> None:
    """Counts per expert, and every chosen id where the scenario asks for it, as a `recorded` workload reads them."""
    if scenario.record.loads:
        shape = (scenario.iterations, scenario.model.layers, scenario.model.experts)
        counts = np.zeros(shape, dtype=np.int64)
        for rank in range(scenario.ranks):
            for row in read_evidence(evidence_path(folder, rank)):
                if row["row"] == Row.ROUTED:
                    counts[row["iteration"], row["layer"]] += np.asarray(row["counts"])
        _write_whole(folder / "loads.npz", lambda file: np.savez_compressed(file, counts=counts))
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
    experts = np.int64(scenario.model.experts)
    _write_whole(folder / "topk_ids.npz", lambda file: np.savez_compressed(file, topk_ids=ids, num_experts=experts))
    for part in parts:
        part.unlink()


def versions() -> dict[str, str]:
    """Of what a run depends on."""
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
    _write_whole(path, lambda file: file.write((json.dumps(data, indent=2) + "\n").encode()))


def _write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """A file is there whole or not at all."""
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
