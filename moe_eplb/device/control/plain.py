"""The balancer's steps on the device in plain torch, one value at a time: exact, slow, and the twin of the kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_eplb.device.control.state import LayerState, ModelState, Outcome, Report, Stage

__all__ = ["fold", "hand_over", "look_ahead", "settle", "settle_and_fold", "take_over", "vote", "vote_and_fold"]


def look_ahead(model: ModelState) -> None:
    """Keep the row of the iteration that comes, where the host has written it: it has a long way."""
    following = int(model.turn[0]) + 1
    row = model.row(following)
    if int(row[0]) == following:
        model.coming.copy_(row)


def take_over(model: ModelState, layer: LayerState) -> None:
    """A layer begins: commit the plan that is due and agreed on, drop one that is due and not; nothing is counted.

    With the first layer the next iteration begins, where the host has written its row.
    """
    layer.counts.zero_()
    if layer.layer == 0:
        following = int(model.turn[0]) + 1
        row = model.coming if int(model.coming[0]) == following else model.row(following)
        if int(row[0]) == following:
            model.turn.copy_(row)
            model.begun.copy_(row[:1])
    at, iteration = layer.layer, int(model.turn[0])
    due = int(model.due[at])
    if 0 <= due <= iteration:
        agreed = due == iteration and int(model.decision[at]) == 1
        if agreed:
            layer.tables.copy_(layer.pending[: layer.tables.numel()])
            layer.cells.copy_(layer.pending[layer.tables.numel() :])
            model.committed[at] = due
        outcome = Outcome.COMMITTED if agreed else Outcome.DROPPED
        report = model.report(at, due)
        report[Report.DUE], report[Report.OUTCOME], report[Report.OUTCOME_ITERATION] = due, outcome, iteration
        model.due[at] = model.decision[at] = -1
    model.stages[at, Stage.TAKE_OVER] = iteration


def vote(
    model: ModelState, layer: LayerState, following: LayerState, *, timeout_ns: int,
    wait: Callable[[int, int, int], int], early: bool = False,
) -> None:  # fmt: skip
    """Make the message of a layer: its counts, and this rank's vote on the plan of the layer that runs next.

    Where a plan is due there and not prepared, the device waits for it up to `timeout_ns`.

    Args:
        model, layer: The layer that carries the vote.
        following: The layer that runs next, the first after the last.
        timeout_ns: The longest wait.
        wait: Waits until ``ready[layer] >= due``, given (layer, due, timeout_ns); the ns that it took. The kernel
            waits by itself.
        early: The iteration ends: whatever layer `following` is, it runs next in the iteration that comes.
    """
    at, carrier, iteration = following.layer, layer.layer, int(model.turn[0])
    due = int(model.due[at])
    lanes = torch.zeros_like(following.lanes)
    if due == _due_of_next(iteration, at, early) and int(model.decision[at]) == -1:
        waited = wait(at, due, 0 if int(model.overdue) else timeout_ns)
        ready = int(model.ready[at]) >= due
        if ready:
            lanes = following.lanes
        else:
            model.overdue.fill_(1)
        report = model.report(at, due)
        report[Report.DUE], report[Report.READY_HERE], report[Report.WAITED_NS] = due, int(ready), waited
        report[Report.OUTCOME] = Outcome.NONE
    if bool((layer.counts < 0).any()):
        model.overflow[carrier] = iteration + 1
    layer.message[: layer.experts] = layer.counts
    layer.message[layer.experts :] = lanes
    model.stages[carrier, Stage.VOTE] = iteration


def settle(model: ModelState, following: LayerState, lanes: Tensor, *, ranks: int, early: bool = False) -> None:
    """Decide on the plan of the layer that runs next by the votes of all ranks, int64 [N, LANES], which are summed."""
    at, iteration = following.layer, int(model.turn[0])
    due = int(model.due[at])
    if due != _due_of_next(iteration, at, early) or int(model.decision[at]) != -1:
        return
    ready, high, high2, low, low2 = (int(value) for value in lanes.sum(0))
    differ = ready * high2 != high * high or ready * low2 != low * low
    model.decision[at] = int(ready == ranks and not differ)
    report = model.report(at, due)
    report[Report.READY_RANKS], report[Report.DIGESTS_DIFFER], report[Report.VOTED] = ready, int(differ), iteration


def fold(model: ModelState, layer: LayerState, counts: Tensor, *, decay: float) -> None:
    """Fold the counts of all ranks, int [N, E], which are summed, into the load, unless this iteration does not count.

    Negative ones are int32 that went over, and are noted.

    ``load = load * decay + mean of the last W counts``, each operation rounded to float32 by itself.
    """
    if bool((counts < 0).any()):
        model.overflow[layer.layer] = int(model.turn[0]) + 1
    if int(model.turn[1]):
        total = counts.to(torch.int64).sum(0)
        window, folded = layer.recent.shape[0], int(layer.folded)
        layer.recent[folded % window] = total
        layer.folded += 1
        filled = min(folded + 1, window)
        sample = layer.recent[:filled].sum(0).to(torch.float32) / filled
        decayed = layer.load * decay
        layer.load.copy_(decayed + sample)
        layer.reduced.copy_(total)
    model.stages[layer.layer, Stage.FOLD] = int(model.turn[0])


def settle_and_fold(
    model: ModelState, layer: LayerState, following: LayerState, message: Tensor, *, ranks: int, decay: float
) -> None:
    """`settle` and `fold` of what the ranks have summed: counts and lanes, int64 [E + LANES]."""
    summed = message.unsqueeze(0)
    settle(model, following, summed[:, layer.experts :], ranks=ranks)
    fold(model, layer, summed[:, : layer.experts], decay=decay)


def vote_and_fold(
    model: ModelState, layer: LayerState, following: LayerState, *, timeout_ns: int,
    wait: Callable[[int, int, int], int], decay: float,
) -> None:  # fmt: skip
    """`vote` and `settle_and_fold` of one rank, which has nobody to sum with."""
    vote(model, layer, following, timeout_ns=timeout_ns, wait=wait)
    settle_and_fold(model, layer, following, layer.message, ranks=1, decay=decay)


def hand_over(model: ModelState, layer: LayerState, *, delay: int) -> None:
    """A layer ends: where it is its turn, give its load to the host and ring the bell.

    The plan will be due `delay` iterations later. A layer with a plan under way keeps its load, but rings too, since
    the host waits for one ring for each turn.
    """
    at, iteration = layer.layer, int(model.turn[0])
    model.stages[at, Stage.HAND_OVER] = iteration
    if not int(model.turn[2 + at]):
        return
    if int(model.due[at]) < 0:
        layer.handed_load.copy_(layer.load)
        layer.handed.fill_(iteration)
        layer.load.zero_()
        model.due[at], model.decision[at] = iteration + delay, -1
    model.rung += 1
    model.bell.copy_(model.rung)


def _due_of_next(iteration: int, following: int, early: bool) -> int:
    """In which iteration the layer that runs next will run."""
    return iteration + (early or following == 0)
