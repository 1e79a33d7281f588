"""Slots and what is staged for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from moe_eplb.balancer.host_memory import new_instance
from moe_eplb.balancer.host_weights import HostMoeTensorSharer
from moe_eplb.balancer.migrate import SlotWeights
from moe_eplb.core.errors import BalancerError


@pytest.fixture
def host() -> Iterator[HostMoeTensorSharer]:
    """Three experts with weights "scale" float32 [2] and "w" bfloat16 [2, 3]."""
    sharer = HostMoeTensorSharer(1, 3, rank=0, ranks=1, instance=new_instance(), group=None)
    for expert in range(3):
        sharer.share_host_tensor(expert, "w", torch.full((2, 3), expert + 1.0, dtype=torch.bfloat16))
        sharer.share_host_tensor(expert, "scale", torch.full((2,), expert + 0.5))
    sharer.finalize()
    yield sharer
    sharer.close()


def slots() -> tuple[SlotWeights, torch.Tensor, torch.Tensor]:
    weights, scales = torch.zeros(2, 2, 3, dtype=torch.bfloat16), torch.zeros(2, 2)
    made = SlotWeights(1, 2)
    for slot in range(2):
        made.register(slot, "w", weights[slot])
        made.register(slot, "scale", scales[slot])
    return made, weights, scales


def test_staging_touches_no_slot_and_writing_only_those_that_change(host: HostMoeTensorSharer) -> None:
    made, weights, scales = slots()
    made.check(host)
    staged = made.stage([(1, 2)], host)
    assert staged.bytes == 2 * 3 * 2 + 2 * 4
    assert not weights.any()
    assert not scales.any()
    made.write(staged)
    assert weights.tolist() == [[[0.0] * 3] * 2, [[3.0] * 3] * 2]
    assert scales.tolist() == [[0.0, 0.0], [2.5, 2.5]]


def test_what_is_staged_is_a_copy(host: HostMoeTensorSharer) -> None:
    made, weights, _ = slots()
    staged = made.stage([(0, 0)], host)
    host.host_tensor(0, "w").fill_(9.0)
    made.write(staged)
    assert weights[0].tolist() == [[1.0] * 3] * 2


def test_nothing_to_change_stages_nothing(host: HostMoeTensorSharer) -> None:
    staged = slots()[0].stage([], host)
    assert (staged.tensors, staged.bytes) == ([], 0)


def test_a_slot_that_is_not_there() -> None:
    for slot in (-1, 2):
        with pytest.raises(BalancerError, match=f"no local slot {slot}") as info:
            SlotWeights(1, 2).register(slot, "w", torch.zeros(1))
        assert info.value.code == "E135"


def test_a_weight_registered_twice() -> None:
    with pytest.raises(BalancerError, match="w of local slot 0 was registered twice") as info:
        slots()[0].register(0, "w", torch.zeros(2, 3))
    assert info.value.code == "E136"


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("bias", torch.zeros(2)),
        ("scale", torch.zeros(1)),  # a copy would silently broadcast
        ("scale", torch.zeros(2, dtype=torch.float64)),  # a copy would silently convert
        (None, torch.zeros(0)),
    ],
)
def test_slots_unlike_the_host_copies_are_refused(
    host: HostMoeTensorSharer, name: str | None, tensor: torch.Tensor
) -> None:
    made = SlotWeights(1, 1)
    made.register(0, "w", torch.zeros(2, 3, dtype=torch.bfloat16))
    if name is not None:
        made.register(0, name, tensor)
    with pytest.raises(BalancerError, match="layer 1: local slot 0 and the host copy have different weights") as info:
        made.check(host)
    assert info.value.code == "E137"
