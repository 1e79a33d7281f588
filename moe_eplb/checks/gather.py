"""Collects one rank's evidence while its layers run. Gathers only: what the evidence means is judged elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moe_eplb.checks.attestation import SlotAttestation
from moe_eplb.checks.equality import TOLERANCE, compare, reference_output, shared_reference
from moe_eplb.checks.exactly_once import exchange
from moe_eplb.checks.layer_evidence import LayerEvidence
from moe_eplb.checks.replica_twin import expected_slot_counts
from moe_eplb.checks.routing_twin import misrouted, scales_of
from moe_eplb.checks.topk_ids import TopkIds
from moe_eplb.core.evidence import EvidenceWriter, Row
from moe_eplb.core.placement import Placement
from moe_eplb.core.planner import Plan
from moe_eplb.moe.routing_rule import RoutingRule

__all__ = ["EvidenceGatherer", "WatchedLayer"]


@dataclass(slots=True)
class WatchedLayer:
    """What the gatherer knows of a layer.

    `slots`: by local slot, the tensors the kernel reads. `master`: weights by expert. `placement`: the committed one.
    `rule`: what its router must do. `shared`: weights of the shared expert, None without one.
    """

    slots: Sequence[Mapping[str, Tensor]]
    master: Callable[[int], Mapping[str, Tensor]]
    placement: Callable[[], Placement]
    dtype: torch.dtype
    attestation: SlotAttestation
    rule: RoutingRule
    shared: Mapping[str, Tensor] | None = None


class EvidenceGatherer:
    """A `Probe` that writes evidence rows.

    Args:
        writer: This rank's evidence file.
        rank, ranks: This rank among R.
        group: Process group of the check's own exchanges, None for one rank.
        local_first: Whether replicas are chosen local-first.
        checks: Names of the checks that are on.
    """

    def __init__(
        self,
        writer: EvidenceWriter,
        *,
        rank: int,
        ranks: int,
        group: dist.ProcessGroup | None,
        local_first: bool,
        checks: frozenset[str],
    ) -> None:
        self._writer, self._rank, self._ranks, self._group = writer, rank, ranks, group
        self._local_first, self._checks = local_first, checks
        self._layers: dict[int, WatchedLayer] = {}
        self._now: dict[int, LayerEvidence] = {}
        self._written_digest: dict[int, int] = {}
        self._to_attest: dict[int, list[int]] = {}
        self._stall_us: dict[int, int] = {}
        self._awaited_us: dict[int, int] = {}
        self._sources: dict[int, dict[str, int]] = {}
        self.iteration = -1
        self.topk_ids: TopkIds | None = None

    def watch(self, index: int, layer: WatchedLayer) -> None:
        """Watch a layer and attest its initial weights."""
        self._layers[index] = layer
        self._attest(index, ())

    # -- Probe -----------------------------------------------------------------------------------------------------

    def routed(self, layer: int, expert_ids: Tensor, slot_ids: Tensor) -> None:
        if layer in self._to_attest:
            self._attest(layer, self._to_attest.pop(layer))
        placement, ids = self._layers[layer].placement(), expert_ids.cpu()
        expected = expected_slot_counts(
            ids.numpy(), placement.slot_to_expert, rank=self._rank, ranks=self._ranks, local_first=self._local_first
        )
        seen = self._of(layer)
        # A second row in one iteration means that it changed under the layer's feet, which the judge must see.
        if not seen.ids or placement.digest() != self._written_digest[layer]:
            self._write_placement(layer, placement)
        seen.add_routed(ids, expected)

    def processed(self, layer: int, source_rank: Tensor, token: Tensor, k: Tensor, slot: Tensor) -> None:
        source_rank, token, k, slot = (tensor.cpu() for tensor in (source_rank, token, k, slot))
        watched = self._layers[layer]
        per_rank = len(watched.slots)
        local = slot.to(torch.int64) - self._rank * per_rank
        held = torch.tensor([watched.attestation.expert(s) for s in range(per_rank)] + [-1], dtype=torch.int64)
        inside = (local >= 0) & (local < per_rank)
        found = held[torch.where(inside, local, per_rank)]
        self._of(layer).add_processed(source_rank, token, k, slot, found)

    def output(
        self, layer: int, x: Tensor, router_logits: Tensor, expert_ids: Tensor, scales: Tensor, y: Tensor
    ) -> None:
        if "equality" in self._checks:
            watched = self._layers[layer]
            logits, ids = router_logits.to(torch.float64).cpu().numpy(), expert_ids.cpu().numpy()
            # Not the layer's own scales: a routing method that swaps them must not be compared with itself.
            exact = torch.from_numpy(scales_of(watched.rule, logits, ids))
            reference = reference_output(x.cpu(), expert_ids.cpu(), exact, watched.master)
            seen = self._of(layer)
            seen.routed_output.add(compare(y.cpu(), reference), x.shape[0], misrouted(watched.rule, logits, ids))
            seen.routed_reference = reference

    def shared_output(self, layer: int, x: Tensor, y: Tensor) -> None:
        shared = self._layers[layer].shared
        if "equality" in self._checks and shared is not None:
            self._of(layer).shared_output.add(compare(y.cpu(), shared_reference(x.cpu(), shared)), x.shape[0])

    def block_output(self, layer: int, x: Tensor, y: Tensor) -> None:
        shared, seen = self._layers[layer].shared, self._of(layer)
        routed, seen.routed_reference = seen.routed_reference, None
        if "equality" in self._checks and shared is not None and routed is not None:
            seen.block_output.add(compare(y.cpu(), routed, shared_reference(x.cpu(), shared)), x.shape[0])

    def reduced(self, layer: int, counts: np.ndarray, balancedness: float) -> None:
        self._write(Row.REDUCED, layer, counts=counts.tolist())
        self._write(Row.BALANCE, layer, value=balancedness)

    def stalled(self, layer: int, seconds: float) -> None:
        self._stall_us[layer] = round(seconds * 1e6)

    def awaited(self, layer: int, seconds: float) -> None:
        self._awaited_us[layer] = round(seconds * 1e6)

    def planned(self, layer: int, taken: int, due: int, plan: Plan, staged_bytes: int) -> None:
        self._write(
            Row.PLAN, layer, taken=taken, due=due, digest=plan.placement.digest(), changed=plan.changed.tolist(),
            bytes=staged_bytes, predicted=plan.predicted.tolist(), **self._waits(layer),
        )  # fmt: skip

    def copied(self, layer: int, by_source: Mapping[str, int]) -> None:
        self._sources[layer] = dict(by_source)

    def committed(self, layer: int, taken: int, placement: Placement, changed: np.ndarray, moved_bytes: int) -> None:
        first = self._rank * placement.slots_per_rank
        local = [int(s) - first for s in changed if first <= s < first + placement.slots_per_rank]
        self._write(
            Row.COMMIT, layer, taken=taken, digest=placement.digest(), changed=changed.tolist(), local_changed=local,
            bytes=moved_bytes, sources=self._sources.pop(layer, {}),
        )  # fmt: skip
        # Not here: this is inside the balancer's own work, whose time must not hold that of a check.
        self._to_attest[layer] = local

    def dropped(self, layer: int, due: int, ready: int, digests_differ: bool, reason: str) -> None:
        self._write(
            Row.DROPPED, layer, due=due, ready=ready, ranks=self._ranks, digests_differ=digests_differ, reason=reason,
            **self._waits(layer),
        )  # fmt: skip

    def _waits(self, layer: int) -> dict[str, int]:
        """For the plan that comes to its end now."""
        return {"stall_us": self._stall_us.pop(layer, 0), "awaited_us": self._awaited_us.pop(layer, 0)}

    def iterated(self, iteration: int) -> None:
        return None

    # -- iteration boundaries -----------------------------------------------------------------------------------------

    def end_iteration(self) -> None:
        """Exchange what was processed with the source ranks and write down what the iteration's layers did."""
        if self._now:
            entries = torch.cat([self._received(layer) for layer in sorted(self._layers)])
            arrived = exchange(entries[:, 1:], entries[:, 0], ranks=self._ranks, group=self._group)
            for layer in sorted(self._layers):
                self._write_layer(layer, self._of(layer), arrived[arrived[:, 0] == layer][:, 1:])
        if self.topk_ids is not None:
            self.topk_ids.append([self._of(layer).ids for layer in sorted(self._layers)])
        self._now.clear()
        self._writer.flush()

    def finish(self) -> None:
        """Attest all slots once more after the last iteration."""
        for layer in sorted(self._layers):
            self._attest(layer, ())

    def _of(self, layer: int) -> LayerEvidence:
        return self._now.setdefault(layer, LayerEvidence())

    def _received(self, layer: int) -> Tensor:
        """This rank's processed entries (source, layer, chunk, token, k, slot, found); writes their counts per slot."""
        rows = self._of(layer).rows()
        per_rank = len(self._layers[layer].slots)
        local = rows[:, 4] - self._rank * per_rank
        inside = local[(local >= 0) & (local < per_rank)]
        self._write(Row.RECEIVED, layer, slots=torch.bincount(inside, minlength=per_rank).tolist())
        tag = torch.full((rows.shape[0], 1), layer, dtype=torch.int64)
        return torch.cat([rows[:, :1], tag, rows[:, 1:]], dim=1)

    def _write_layer(self, layer: int, seen: LayerEvidence, arrived: Tensor) -> None:
        """Rows of a layer's iteration; `arrived`: what all ranks processed of this rank's tokens."""
        if seen.expected is not None:
            placement = self._layers[layer].placement()
            self._write(Row.ROUTED, layer, counts=seen.counts(placement.experts).tolist())
            self._write(Row.EXPECTED, layer, slots=seen.expected.tolist())
            self._write(Row.DISPATCH, layer, **asdict(seen.dispatch(arrived, slots=placement.slots)))
        if "equality" in self._checks:
            shared = {"shared_ratio": seen.shared_output.worst.ratio, "shared_tokens": seen.shared_output.tokens}
            shared |= {"block_ratio": seen.block_output.worst.ratio, "block_tokens": seen.block_output.tokens}
            routed = asdict(seen.routed_output.worst)
            routed |= {"tokens": seen.routed_output.tokens, "misrouted": seen.routed_output.misrouted}
            tolerance = TOLERANCE[self._layers[layer].dtype]
            self._write(Row.EQUALITY, layer, **routed, tolerance=tolerance, **shared)

    def _attest(self, layer: int, changed: Sequence[int]) -> None:
        watched = self._layers[layer]
        placement = watched.placement()
        first = self._rank * placement.slots_per_rank
        expected = placement.slot_to_expert[first : first + placement.slots_per_rank].tolist()
        changed_bytes = watched.attestation.read()
        mismatched = [
            [first + slot, expected[slot], watched.attestation.digest(slot)]
            for slot in watched.attestation.mismatches(expected)
        ]
        self._write(
            Row.ATTEST, layer, slots=len(expected), mismatched=mismatched, changed_bytes=changed_bytes,
            local_changed=len(changed),
        )  # fmt: skip

    def _write_placement(self, layer: int, placement: Placement) -> None:
        """The digest each iteration; the slots only when they changed, which they rarely do."""
        digest = placement.digest()
        fields: dict[str, Any] = {"digest": digest}
        if self._written_digest.get(layer) != digest:
            fields["slots"] = placement.slot_to_expert.tolist()
            self._written_digest[layer] = digest
        self._write(Row.PLACEMENT, layer, **fields)

    def _write(self, row: Row, layer: int, **fields: Any) -> None:
        self._writer.write(row, layer, self.iteration, **fields)


def watched_layer(
    slots: Sequence[Mapping[str, Tensor]],
    master: Callable[[int], Mapping[str, Tensor]],
    placement: Callable[[], Placement],
    dtype: torch.dtype,
    rule: RoutingRule,
    shared: Mapping[str, Tensor] | None = None,
) -> WatchedLayer:
    """A `WatchedLayer` with its attestation."""
    attestation = SlotAttestation(slots, master, placement().experts)
    return WatchedLayer(slots, master, placement, dtype, attestation, rule, shared)
