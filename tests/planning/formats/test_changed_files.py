"""Good files of every form, cut short or changed at random: read as something sound, or refused."""

from __future__ import annotations

import io
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_eplb.core.errors import ScenarioError, UsageError
from moe_eplb.planning.formats.loads import read_counts, write_counts
from moe_eplb.planning.formats.placements import read_placement, write_placement
from moe_eplb.planning.formats.registry import LOADS, PLACEMENTS
from moe_eplb.planning.loads import LoadSet
from moe_eplb.planning.placements import PlacementSet

from .drawn import COUNTS, EVERYTHING


def _samples() -> dict[str, bytes]:
    """One small good file of every form that is a file."""
    loads = LoadSet(COUNTS, (3, 5), "x", (), True, EVERYTHING)
    there = PlacementSet(np.array([[0, 1, 1, 0]], np.int32), 2, 2, (3,), "x")
    made = {f"loads {form}": write_counts(loads, form)[0] for form, one in LOADS.items() if one.write}
    made |= {f"placement {form}": {"": write_placement(there, form)[0]} for form in PLACEMENTS}
    buffer = io.BytesIO()
    records = [{"forward_pass_id": 1, "rank": 0, "gatherer_key": "p", "global_physical_count": torch.ones(1, 2)}]
    torch.save({"records": records, "last_physical_to_logical_map": torch.tensor([[0, 1]])}, buffer)
    made["per pass"] = {"": buffer.getvalue()}
    return {f"{name} {file}".strip(): content for name, one in made.items() for file, content in one.items()}


_SAMPLES = _samples()


@pytest.mark.parametrize("name", sorted(_SAMPLES))
def test_truncated_files(tmp_path: Path, name: str) -> None:
    whole = _SAMPLES[name]
    for cut in range(1, len(whole), max(1, len(whole) // 60)):
        (tmp_path / "a").write_bytes(whole[:cut])
        _read_both(tmp_path / "a")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(_SAMPLES)), st.data())
def test_changed_files(tmp_path: Path, name: str, data: st.DataObject) -> None:
    content = bytearray(_SAMPLES[name])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    (tmp_path / "a").write_bytes(content)
    _read_both(tmp_path / "a")


def _read_both(path: Path) -> None:
    """Either it is read, as something that is sound, or refused with exit code 2."""
    with suppress(ScenarioError, UsageError):
        assert read_counts(path).counts.min() >= 0
    with suppress(ScenarioError, UsageError):
        placement = read_placement(path, ranks=2)
        assert all(set(row.tolist()) == set(range(placement.experts)) for row in placement.slots)
