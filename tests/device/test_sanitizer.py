"""What kernels declare to torch's CUDA sanitizer is what they do, and a missing join between streams is found by it."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_eplb.analysis.role_table import load_role_table
from moe_eplb.balancer import resident_layer
from moe_eplb.balancer.layer_stream import LayerStream
from moe_eplb.core.events import EventSink, Role
from moe_eplb.device import control, ops, sanitizer
from moe_eplb.device.base import Event, Stream
from moe_eplb.device.cpu import CpuDevice
from moe_eplb.device.sanitizer import Declaration, declarations, declares
from tests.device.test_control import DEVICE, TIMEOUT_NS, WAIT, triton_all, triton_control, twins
from tests.support import balanced

# Behind the import above, which turns Triton's interpreter on where there is no GPU.
triton_ops = pytest.importorskip("moe_eplb.device.ops.triton_ops")
triton_group = pytest.importorskip("moe_eplb.device.ops.triton_group")
OPS = ("choose", "ffn", "fp8", "group", "group_few", "rows", "sends")
NAMES = (*(f"ops.triton_{name}" for name in OPS), "control.triton_all", "control.triton_control", "control.triton_load")
MODULES = [pytest.importorskip(f"moe_eplb.device.{name}") for name in NAMES]
triton_load = MODULES[-1]
HOST_VISIBLE = {"turns", "begun", "bell", "committed", "reports", "overflow", "handed", "handed_load"}


# -- declarations ----------------------------------------------------------------------------------------------------


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().flatten().view(torch.uint8)


@pytest.fixture
def known() -> dict[int, Declaration]:
    """By identity of the kernel."""
    return {id(declaration.kernel): declaration for declaration in declarations()}


@pytest.fixture
def changed(known: dict[int, Declaration], monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, set[str]]]:
    """By kernel, the arguments that its launches have changed; one that it has not declared fails the test at once."""
    found: dict[str, set[str]] = {d.kernel.__name__: set() for d in declarations()}
    run = type(triton_load._fold).run

    def watched(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        declaration = known[id(kernel)]
        tensors = dict(declaration.tensors(arguments, named))
        before = {name: bits(tensor) for name, tensor in tensors.items()}
        result = run(kernel, *arguments, grid=grid, warmup=warmup, **named)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        written = {tensors[name].data_ptr() for name in declaration.writes & tensors.keys()}
        for name, tensor in tensors.items():
            if not torch.equal(before[name], bits(tensor)):
                # A tensor that stands in for one that is not there is written under its own name.
                assert tensor.data_ptr() in written, f"{kernel.__name__} writes {name} and does not say so"
                found[kernel.__name__] |= {name} & declaration.writes
        return result

    monkeypatch.setattr(type(triton_load._fold), "run", watched)
    torch.use_deterministic_algorithms(True)  # new memory is filled, so that what is written into it is seen
    yield found
    torch.use_deterministic_algorithms(False)


def ids(tokens: int, experts: int, top_k: int = 3) -> torch.Tensor:
    draw = torch.Generator().manual_seed(tokens)
    return torch.randint(-1, experts, (tokens, top_k), generator=draw, dtype=torch.int32).to(DEVICE)


def launch_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    count = torch.full((5,), 2, dtype=torch.int32, device=DEVICE)
    start, slots = (torch.arange(0, 10, step, dtype=torch.int32, device=DEVICE) for step in (2, 1))
    cells = torch.randperm(5).int().to(DEVICE)
    hidden = torch.randn(20, 64).to(DEVICE)
    triton_ops.histogram(ids(20, 5), torch.zeros(5, dtype=torch.int32, device=DEVICE))
    triton_ops.route(ids(20, 5), count, start, slots, offset=1, invalid=10)
    counts = torch.zeros(5, dtype=torch.int32, device=DEVICE)
    triton_ops.route(ids(20, 5), count, start, slots, offset=1, invalid=10, counts=counts)
    triton_ops.top_k(torch.randn(7, 5).to(DEVICE), 2, "renormalize")
    for small in (4096, 0):
        monkeypatch.setattr(triton_group, "_SMALL", small)
        for table in (None, cells):
            rows, position, offs = triton_ops.permute_rows(hidden, ids(20, 5), 5, table)
            triton_ops.permute_rows_fp8(hidden, ids(20, 5), 5, table)
        rows, position, offs, parts = triton_ops.permute_in_parts(hidden, ids(20, 5), cells, 16)
    for ends in (None, offs):
        triton_ops.swiglu(rows, ends)
        triton_ops.swiglu_fp8(rows, ends)
    triton_ops.grouped_swiglu(rows, torch.randn(5, 32, 64).to(DEVICE), parts)
    triton_ops.combine(rows, position, torch.rand(20, 3).to(DEVICE))
    triton_ops.add_blocks(torch.randn(2, 4, 64).to(DEVICE), 3, torch.float32)
    columns = [torch.ones(3, width, dtype=torch.int32, device=DEVICE) for width in (4, 2)]
    triton_ops.pack_rows(columns, torch.zeros(5, 6, dtype=torch.int32, device=DEVICE))
    launch_sends()


def launch_sends() -> None:
    slots = ids(7, 6)
    place, token_at = triton_ops.order_sends(slots, ranks=2, slots_per_rank=3, block=7)
    rows = torch.zeros(14, 16, dtype=torch.int32, device=DEVICE)
    triton_ops.send_rows((slots, slots, slots), token_at, rows, rank=0)
    scales = rows[:, 3:6].view(torch.float32)
    marks = triton_ops.arrive(scales, rows[:, 6:12], rank=0, block=7, slots_per_rank=3).marks
    triton_ops.add_returned(torch.randn(14, 64).to(DEVICE), marks, place, rank=0, block=7)


def launch_control(seed: int, layer: int) -> None:
    """All steps, with a plan that is due; it is ready in every other launch."""
    world, _ = twins(seed)
    model, state, following = world.model, world.layers[layer], world.layers[(layer + 1) % 3]
    at = following.layer
    model.row(5).copy_(model.turn)
    model.turn[0] = 4
    model.turn[1:] = -1
    if seed % 2:
        triton_control.look_ahead(model)
    triton_control.take_over(model, world.layers[0])
    state.counts[0] = -5 if seed == 3 else 5
    model.due[at], model.decision[at], model.ready[at] = 5 + (at == 0), -1, 9 if seed % 2 else -1
    triton_control.vote(model, state, following, timeout_ns=TIMEOUT_NS // 20, wait=WAIT)
    triton_control.settle(model, following, torch.stack([state.message[state.experts :]] * 2), ranks=2)
    model.overflow.zero_()
    triton_control.fold(model, state, torch.stack([state.counts] * 3), decay=0.95)
    model.decision[at], model.stages[:] = -1, -1
    triton_control.settle_and_fold(model, state, following, state.message, ranks=1, decay=0.95)
    model.due[at], model.decision[at], model.overdue[0] = 5 + (at == 0), -1, 0
    model.stages[:], model.reports[:], model.overflow[:], state.message[:], state.reduced[:] = -1, -1, 0, -1, -1
    triton_control.vote_and_fold(model, state, following, timeout_ns=TIMEOUT_NS // 20, wait=WAIT, decay=0.95)
    model.due[at], model.decision[at] = 5, 1
    triton_control.take_over(model, following)
    model.turn[2 + layer], model.due[layer] = 1, -1
    triton_control.hand_over(model, state, delay=2)


def launch_control_of_all(seed: int) -> None:
    """The steps of all layers, likewise."""
    world, _ = twins(seed)
    model, stack = world.model, world.stack
    assert stack is not None
    stack.counts[seed % 3, 0] = -5 if seed == 3 else 5
    model.due[seed % 3], model.decision[seed % 3], model.ready[:] = 6, -1, 9 if seed % 2 else -1
    triton_all.vote_all(model, stack, timeout_ns=TIMEOUT_NS // 20, wait=WAIT)
    model.stages[:] = -1
    triton_all.settle_and_fold_all(model, stack, ranks=1, decay=0.95)
    model.turn[2 + seed % 3], model.due[seed % 3], model.decision[seed % 3] = 1, -1, 1
    triton_all.hand_over_all(model, stack, delay=2)


def test_kernels_write_what_they_declare_and_nothing_else(
    changed: dict[str, set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch_operations(monkeypatch)
    for seed in range(12):
        launch_control(seed, seed % 3)
        launch_control_of_all(seed)
    declared = {d.kernel.__name__: set(d.writes) for d in declarations()}
    assert changed == declared, "a declared write was seen in no launch"


def test_a_write_that_is_not_declared_is_found(
    changed: dict[str, set[str]], known: dict[int, Declaration], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = triton_load._fold
    known[id(kernel)] = Declaration(kernel, known[id(kernel)].writes - {"recent"}, frozenset())
    with pytest.raises(AssertionError, match="_fold writes recent and does not say so"):
        launch_control(1, 0)


def test_every_kernel_that_is_launched_is_declared() -> None:
    launched = {
        name for module in MODULES for name in re.findall(r"^ +(_\w+)\[.*\]\(", inspect.getsource(module), re.MULTILINE)
    }
    assert launched == {d.kernel.__name__ for d in declarations()}
    assert len(launched) == 30


def test_a_report_knows_the_role_of_every_kernel() -> None:
    table = load_role_table()
    unknown = [d.kernel.__name__ for d in declarations() if table.by_name(d.kernel.__name__) is Role.UNKNOWN]
    assert unknown == []


def test_a_declaration_names_arguments() -> None:
    with pytest.raises(TypeError, match=r"no arguments \['nobody'\]"):
        declares(writes=["nobody"])(triton_load._fold)


# -- races -----------------------------------------------------------------------------------------------------------


class Traced(CpuDevice):
    """Runs work at once, and tells the sanitizer of streams and events as CUDA does."""

    handler: Any

    def record(self, event: Event, stream: Stream, *, within: bool = False) -> None:
        super().record(event, stream, within=within)
        self.handler._handle_event_record(id(event), stream.index)

    def wait(self, stream: Stream, event: Event) -> None:
        super().wait(stream, event)
        self.handler._handle_event_wait(id(event), stream.index)


class World:
    """A balancer whose kernels run in the interpreter, followed by a sanitizer of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, later: bool = False, **options: Any) -> None:
        from torch.cuda import _sanitizer as csan  # begins to trace where there is a GPU

        self._later = later
        self.handler, self.errors = csan.EventHandler(), csan.CUDASanitizerErrors
        dispatch = SimpleNamespace(event_handler=self.handler)
        module = SimpleNamespace(
            cuda_sanitizer=SimpleNamespace(enabled=True, dispatch=dispatch), CUDASanitizerErrors=self.errors
        )
        for declaration in declarations():
            monkeypatch.setattr(declaration.kernel, "pre_run_hooks", [])
        monkeypatch.setattr(sanitizer, "_attached", 0)
        monkeypatch.setattr(sanitizer, "_sanitizer", lambda: module)
        sanitizer.attach()
        monkeypatch.setattr(control, "_for", lambda model: triton_control)
        monkeypatch.setattr(control, "_for_all", lambda model: triton_all)
        monkeypatch.setattr(ops, "_at", lambda tensor: triton_ops)
        monkeypatch.setattr(balanced, "get_device", self._device)
        self.rig = balanced.Rig(layers=2, updates=2, resident=True, **options)
        followed = self._device_memory()
        monkeypatch.setattr(sanitizer, "_followed", lambda tensor: tensor.data_ptr() in followed)
        monkeypatch.setattr(sanitizer, "_stream", lambda: self.rig.balancer.device.current.index)

    def _device(self, kind: str, sink: EventSink, **_: Any) -> Traced:
        device = Traced(sink)
        device.handler, device.immediate = self.handler, not self._later
        return device

    def _device_memory(self) -> set[int]:
        """Addresses of what would live on the device, and lives as long as the balancer."""
        states: list[Any] = [self.rig.layers[0].resident.model]  # type: ignore[attr-defined]
        states += [layer.state for layer in self.rig.layers]  # type: ignore[attr-defined]
        names = [(state, f.name) for state in states for f in dataclasses.fields(state) if f.name not in HOST_VISIBLE]
        return {getattr(state, name).data_ptr() for state, name in names if name != "layer"}


def followed(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Iterator[World]:
    if DEVICE.type == "cuda":
        pytest.skip("real streams are followed instead, in tests/gpu/test_sanitizer.py")
    made = World(monkeypatch, **options)
    yield made
    made.rig.balancer.shutdown()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    yield from followed(monkeypatch)


def followed_in(world: World, iterations: int) -> int:
    """How many kernels were followed in iterations without a race, in which experts moved as they should."""
    world.rig.iterate(iterations)
    world.rig.balancer.collect()
    world.rig.assert_weights_match()
    assert len(world.rig.journal.commits) > 2
    seen: int = world.handler.seq_num
    return seen


def told_of_a_race(world: World, capsys: pytest.CaptureFixture[str]) -> str:
    """What the sanitizer says of iterations in which it must find a race."""
    with pytest.raises(world.errors):
        world.rig.iterate(5)
    return capsys.readouterr().err


def test_the_choreography_has_no_race(world: World) -> None:
    assert followed_in(world, 5) == 5 * 2 * 4, "four kernels a layer were followed"


@pytest.fixture
def holding(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(resident_layer, "_FEW", 0)
    yield from followed(monkeypatch, holds=True)


def test_held_statistics_have_no_race(holding: World) -> None:
    assert followed_in(holding, 5) == 5 * 2 * 5, "five kernels a layer were followed"


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """The second layer is taken over by the first, as where the host does not look at the end of each stage."""
    for made in followed(monkeypatch, later=True, commit_delay=2):
        made.rig.share_queue()
        yield made


def test_a_layer_that_is_taken_over_early_is_in_no_race(early: World) -> None:
    assert followed_in(early, 6) == 6 * (2 * 4 + 1), "four kernels a layer and a look ahead were followed"


def test_a_missing_join_behind_an_early_take_over_is_a_race(
    early: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A layer's end is the only join between the next one's take-over and its route."""
    begin_reading, join = LayerStream.begin_reading, LayerStream.join

    def joins_where_reading_begins(stream: LayerStream, *, joined: bool = False) -> None:
        monkeypatch.setattr(LayerStream, "join", join)
        begin_reading(stream, joined=joined)
        monkeypatch.setattr(LayerStream, "join", lambda one: setattr(one, "joined_by", one._device.current))

    monkeypatch.setattr(LayerStream, "begin_reading", joins_where_reading_begins)
    told = told_of_a_race(early, capsys)
    assert re.search(r"during kernel:\n_route\nreading from argument", told), told
    assert re.search(r"during kernel:\n_take_over\nwriting to argument", told), told


@pytest.fixture
def one_reduction(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    yield from followed(monkeypatch, reduction="iteration", commit_delay=2)


def test_one_reduction_has_no_race(one_reduction: World) -> None:
    assert followed_in(one_reduction, 7) == 7 * (2 * 2 + 3), "two kernels a layer and three for all were followed"


def test_a_vote_of_all_layers_beside_one_that_counts_is_a_race(
    one_reduction: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Layer 0 counts where it routes; its counts are a row of what the vote reads."""
    follow, begun = LayerStream._follow, set[int]()

    def only_at_the_begin(stream: LayerStream, other: Stream) -> None:
        if stream._device.iteration not in begun:
            begun.add(stream._device.iteration)
            follow(stream, other)

    monkeypatch.setattr(LayerStream, "_follow", only_at_the_begin)
    told = told_of_a_race(one_reduction, capsys)
    assert re.search(r"during kernel:\n_vote_all\nreading from argument\(s\) counts", told), told
    assert re.search(r"during kernel:\n_route\n(reading from and )?writing to argument\(s\) \w*counts", told), told


def test_a_missing_join_is_a_race(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_join(stream: LayerStream, *, joined: bool) -> None:
        stream._readers = [stream._device.main]

    monkeypatch.setattr(LayerStream, "begin_reading", no_join)
    told = told_of_a_race(world, capsys)
    assert re.search(r"Access by stream 0 during kernel:\n_route\nreading from argument\(s\) count", told), told
    assert re.search(r"Previous access by stream 4 during kernel:\n_take_over\nwriting to argument", told), told


def test_a_missing_hand_over_of_the_streams_is_a_race(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayerStream, "_follow", lambda stream, other: None)
    with pytest.raises(world.errors):
        world.rig.iterate(5)


def test_what_is_handed_over_by_words_is_not_reported(world: World) -> None:
    world.rig.iterate(4)
    model, state = world.rig.layers[0].resident.model, world.rig.layers[0].state  # type: ignore[attr-defined]
    seen = world.handler.tensors_accessed.accesses
    assert state.tables.data_ptr() in seen
    for tensor in (model.ready, model.overdue, state.lanes, state.pending, model.bell, state.handed_load):
        assert tensor.data_ptr() not in seen


@pytest.mark.skipif("TORCH_CUDA_SANITIZER" in os.environ, reason="the sanitizer is on")
def test_without_the_sanitizer_a_launch_has_no_hook() -> None:
    assert sanitizer._sanitizer() is None
    sanitizer.attach()
    assert all(declaration.kernel.pre_run_hooks == [] for declaration in declarations())


def test_a_report_without_the_sanitizer_does_nothing() -> None:
    sanitizer.report("copy", [("source", torch.zeros(1))], frozenset())


def test_operators_are_named_by_their_arguments() -> None:
    declaration = Declaration(triton_load._fold, frozenset(["load"]), frozenset())
    given = dict(declaration.tensors([torch.zeros(1), torch.ones(1)], {"load": torch.zeros(2), "block": 3}))
    assert list(given) == ["turn", "stages", "load"]


def test_what_ranks_are_forked_from_has_not_begun_to_use_a_gpu() -> None:
    """The sanitizer asks for the current stream of each operation, and what is forked after that cannot use the GPU."""
    code = "import torch, moe_eplb.session.worker; assert not torch.cuda.is_initialized()"
    environment = os.environ | {"TORCH_CUDA_SANITIZER": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
