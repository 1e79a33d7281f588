"""Which operations say whether ranks exchange rows: kernels as their plain twins, without a change of their results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_eplb.device.ops import plain, plain_sends
from tests.device.test_triton_ops import DEVICE, triton_ops

Operation = Callable[[Any, Any, torch.Tensor | None, int], Any]
"""(operations, those of sends, link, tokens): what it returns or has written."""


def words(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.int32, device=DEVICE).view(shape)


def packed(ops: Any, sends: Any, link: torch.Tensor | None, tokens: int) -> Any:
    rows = words(tokens, 6)
    ops.pack_rows((words(tokens, 4),), rows, link)
    return rows


def sent(ops: Any, sends: Any, link: torch.Tensor | None, tokens: int) -> Any:
    rows = words(tokens, 16)
    columns = (words(tokens, 4), words(tokens, 2), words(tokens, 2))
    sends.send_rows(columns, words(tokens), rows, rank=0, link=link)
    return rows


def grouped(ops: Any, sends: Any, link: torch.Tensor | None, tokens: int) -> Any:
    hidden, slots = words(tokens, 8).float(), words(tokens, 2) % 3
    return ops.permute_rows(hidden, slots, 3, None, slots.numel(), link=link)


def grouped_fp8(ops: Any, sends: Any, link: torch.Tensor | None, tokens: int) -> Any:
    hidden, slots = words(tokens, 16).float(), words(tokens, 2) % 3
    rows, *found = ops.permute_rows_fp8(hidden, slots, 3, None, slots.numel(), link=link)
    return rows.float(), *found


def summed(ops: Any, sends: Any, link: torch.Tensor | None, tokens: int) -> Any:
    scales = torch.ones(tokens, 1, device=DEVICE)
    return ops.combine(words(tokens, 8).float(), words(tokens, 1), scales, torch.float32, link)


def added(ops: Any, sends: Any, link: torch.Tensor | None, tokens: int) -> Any:
    return ops.add_blocks(words(2, tokens, 8).float(), tokens, torch.float32, link)


def returned(ops: Any, sends: Any, link: torch.Tensor | None, tokens: int) -> Any:
    marks = torch.stack((torch.zeros_like(words(tokens)), words(tokens)), dim=1)
    place = words(1, tokens)
    return sends.add_returned(words(tokens, 8).float(), marks, place, rank=0, block=tokens, link=link)


@pytest.mark.parametrize("tokens", [0, 5, 2100])
@pytest.mark.parametrize(
    ("operation", "busy", "always"),
    [(packed, 1, False), (sent, 1, False), (summed, 1, False), (grouped, 0, True), (grouped_fp8, 0, True),
     (added, 0, True), (returned, 0, True)],
)  # fmt: skip
def test_the_link_is_told(operation: Operation, busy: int, always: bool, tokens: int) -> None:
    """An exchange that ends is told by a rank without rows, too: nobody else would free its link."""
    silent = operation(triton_ops, triton_ops, None, tokens)
    for ops, sends in ((plain, plain_sends), (triton_ops, triton_ops)):
        link = torch.full((1,), 7, dtype=torch.int32, device=DEVICE)
        found = operation(ops, sends, link, tokens)
        assert int(link) == (busy if tokens or always else 7)
        pairs = zip(found, silent, strict=True) if isinstance(found, tuple) else [(found, silent)]
        assert all(torch.equal(one, other) for one, other in pairs)
