"""What scenarios take of memory and time, as ``scenario check`` prints it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from eplbctl.render.text import table

if TYPE_CHECKING:
    from moe_eplb.core.memory import Memory, MoveTime
    from moe_eplb.core.scenario import Scenario

__all__ = ["Checked", "details", "json_text", "lines"]


@dataclass(frozen=True)
class Checked:
    """A good scenario, what it takes, and how long its moves take; `free`: bytes that /dev/shm offers now."""

    path: str
    scenario: Scenario
    memory: Memory
    move: MoveTime | None
    free: int


def details(one: Checked) -> str:
    """Everything about one scenario."""
    rows = [(what, f"{count:,}", _size(count), of) for what, count, of in _memory_rows(one)]
    parts = [_good(one), table(("memory", "bytes", "size", "of"), rows), _NOT_COUNTED]
    parts += ["\n".join(_moves(one.memory, one.move))] if one.move is not None else []
    return "\n\n".join([*parts, *_warnings(one)])


def lines(several: Sequence[Checked]) -> str:
    """A line each, then what was assumed."""
    made = [line for one in several for line in (_line(one), *_warnings(one))]
    bandwidths = {one.move.bandwidth_gb_s for one in several if one.move is not None}
    return "\n".join([*made, *(f"times are those of moves at {gb_s:g} GB/s (--bandwidth)" for gb_s in bandwidths)])


def json_text(several: Sequence[Checked], *, bandwidth_gb_s: float, step_ms: float | None) -> str:
    """One object with every scenario; `move` is null where nothing moves."""
    scenarios = [
        {
            "path": one.path,
            "name": one.scenario.name,
            "balancer_off": one.scenario.balancer_off_reason(),
            "memory": asdict(one.memory) | {"rank_bytes": one.memory.rank_bytes},
            "move": None if one.move is None else asdict(one.move),
            "shm_free_bytes": one.free,
            "shm_fits": one.memory.shm_bytes <= one.free,
        }
        for one in several
    ]
    assumed = {"bandwidth_gb_s": bandwidth_gb_s, "step_ms": step_ms}
    return json.dumps({"schema": 1, "assumed": assumed, "scenarios": scenarios}, indent=2)


_NOT_COUNTED = "Not counted: activations, the other parts of a model, and what checks keep to compare with."


def _memory_rows(one: Checked) -> Iterator[tuple[str, int, str]]:
    scenario, memory = one.scenario, one.memory
    layers = f"{scenario.model.layers} layers"
    yield "slots", memory.slots_bytes, f"each rank: {scenario.slots_per_rank} slots in each of {layers}"
    yield "routers", memory.router_bytes, f"each rank: {layers}"
    yield "shared experts", memory.shared_bytes, f"each rank: {layers}"
    if one.move is not None:
        staged = memory.staging_bytes // memory.update_bytes
        yield "staging, at most", memory.staging_bytes, f"each rank: {staged} updates of all slots of a layer"
    if memory.host_bytes:
        yield "host copies", memory.host_bytes, "the node: every expert once, in /dev/shm"
        yield "host copies", memory.host_share_bytes, f"of them written by one of {scenario.ranks} ranks, at most"


def _moves(memory: Memory, move: MoveTime) -> Iterator[str]:
    delay = memory.commit_delay
    yield f"Moves: at most {memory.largest_group} layers begin an update in an iteration; each is due {delay} later."
    yield (
        f"At worst all slots of a rank change, which copies {memory.update_bytes:,} bytes to it. What a run usually "
        "copies is not known before it."
    )
    yield f"At {move.bandwidth_gb_s:g} GB/s (assumed: --bandwidth) copying that takes {_ms(move.move_ms)}."
    shortest = f"a step takes {_ms(move.shortest_step_ms)} or longer"
    if move.step_ms is None or move.window_ms is None:
        yield f"Every move fits its window, {delay} x the time of a step, if {shortest} (--step-ms tells of yours)."
        return
    yield f"Window of a move: commit_delay {delay} x {_ms(move.step_ms)} (assumed: --step-ms) = {_ms(move.window_ms)}."
    if move.fits:
        yield f"Every move fits its window: {shortest}."
    else:
        yield f"NOT every move fits its window: at worst the model waits for it, unless {shortest}."


def _line(one: Checked) -> str:
    memory, move = one.memory, one.move
    parts = [_good(one), f"{_size(memory.rank_bytes)} a rank"]
    if move is not None:
        parts.append(f"{_size(memory.host_bytes)} of host memory")
        if move.step_ms is None:
            parts.append(f"moves fit steps of {_ms(move.shortest_step_ms)} or longer")
        else:
            word = "fit" if move.fits else "do NOT fit"
            parts.append(f"moves {word} steps of {_ms(move.step_ms)}")
    return ", ".join(parts)


def _good(one: Checked) -> str:
    reason = one.scenario.balancer_off_reason()
    return f"{one.path}: good" + (f" (balancer: off, because {reason})" if reason else "")


def _warnings(one: Checked) -> list[str]:
    need = one.memory.shm_bytes
    if need <= one.free:
        return []
    return [
        f"warning: /dev/shm offers {one.free:,} bytes now, {need:,} are needed on this node: a run here would be "
        f"refused\n  fix: mount -o remount,size={2 * need} /dev/shm"
    ]


def _ms(value: float) -> str:
    return f"{value:.3g} ms" if value < 1000 else f"{value:,.0f} ms"


def _size(count: int) -> str:
    value = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:,.1f} GiB"
