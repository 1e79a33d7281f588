"""Good files of every form, cut short or changed at random: read as something sound, or refused."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

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

from .drawn import COUNTS, EVERYTHING, statistics

_MANY = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


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


@_MANY
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


_OTHERS: list[Any] = [
    None, True, -1, 0, 1.5, float(1 << 70), 1 << 62, "x", "1", [], {}, [[1]], [{}], {"a": 1}, [1, [2]], [None],
    [[[0.5]]],
]  # fmt: skip


def _parts(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in a nested one."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from _parts(one, (*path, key))


def _replaced(value: Any, path: tuple[Any, ...], by: Any) -> Any:
    if not path:
        return by
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = _replaced(value[path[0]], path[1:], by)
    return copy


_JSON = {name: json.loads(content) for name, content in _SAMPLES.items() if content[:1] in (b"{", b"[")}


@_MANY
@given(st.sampled_from(sorted(_JSON)), st.data())
def test_json_with_other_values_in_it(tmp_path: Path, name: str, data: st.DataObject) -> None:
    value = _JSON[name]
    for _ in range(data.draw(st.integers(1, 2))):
        value = _replaced(value, data.draw(st.sampled_from(list(_parts(value)))), data.draw(st.sampled_from(_OTHERS)))
    (tmp_path / "a").write_text(json.dumps(value))
    _read_both(tmp_path / "a")
    folder = statistics(tmp_path / "s", [{"0_3": [1, 2, 3]}])
    (folder / "meta_info.json").write_text(json.dumps(value))
    _read_both(folder)


_RECORD = {"forward_pass_id": 1, "rank": 0, "gatherer_key": "p", "global_physical_count": torch.ones(1, 2)}
_DUMPS: list[Any] = [
    {"rank": 0, "logical_count": torch.from_numpy(COUNTS), "average_utilization_rate_over_window": 0.5},
    {"records": [_RECORD], "last_physical_to_logical_map": torch.tensor([[0, 1]])},
    {"physical_to_logical_map": torch.tensor([[0, 1]])},
]
_TENSORS: list[Any] = [
    torch.zeros(0), torch.tensor(3), torch.full((1, 2), -1), torch.full((1, 2), torch.inf), torch.ones(1, 2).bool(),
    torch.ones(1, 2, dtype=torch.float16), torch.ones(2, 2).to_sparse(), torch.ones(1, 1, 2, dtype=torch.uint8),
    torch.ones(1, 2, requires_grad=True), torch.ones(1, 2, dtype=torch.complex64), torch.zeros(1, 2, device="meta"),
    torch.nn.Parameter(torch.ones(1, 2)),
]  # fmt: skip


@_MANY
@given(st.sampled_from(_DUMPS), st.data())
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own, of tensors of rare kinds
def test_dumps_with_other_values_in_them(tmp_path: Path, dump: Any, data: st.DataObject) -> None:
    for _ in range(data.draw(st.integers(1, 2))):
        by = data.draw(st.sampled_from(range(len(_OTHERS) + len(_TENSORS))))
        dump = _replaced(dump, data.draw(st.sampled_from(list(_parts(dump)))), [*_OTHERS, *_TENSORS][by])
    torch.save(dump, tmp_path / "a")
    _read_both(tmp_path / "a")
