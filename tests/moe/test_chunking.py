"""Chunked forwards: the split, both streams joined at both ends, nothing counted twice or lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from moe_eplb.balancer import (
    BalancerOptions,
    MoeLoadBalancer,
    MoeLoadBalancerIterContext,
    moe_load_balancer_set_repeated_for_next_layer,
)
from moe_eplb.core.errors import BalancerError
from moe_eplb.core.events import HOST, Kind, NullSink
from moe_eplb.device import AuxStreamType, CpuDevice, Device, get_device
from moe_eplb.moe import MoeShape, SuppliedMoeRoutingMethod, WideEPMoE, create_moe
from moe_eplb.moe.chunking import ChunkStreams, chunk_count, split
from moe_eplb.moe.dispatch.collectives import Ranks
from moe_eplb.moe.splitter import Splitter
from tests.support.moe_layers import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    TOP_K,
    ListSink,
    Watch,
    expert_weights,
    reference,
    tokens_of,
)
from tests.support.ranks import run_ranks

PATHS = [("alltoall", "gathered"), ("allgather", "local_ids"), ("allgather", "global_ids"), ("alltoall", "local_ids")]


# -- the split -------------------------------------------------------------------------------------------------------


@given(tokens=st.integers(0, 200), chunks=st.integers(1, 40))
def test_parts_cover_all_tokens_in_order_and_differ_by_one(tokens: int, chunks: int) -> None:
    parts = split(tokens, chunks)
    sizes = [part.rows.stop - part.rows.start for part in parts]
    assert [row for part in parts for row in range(part.rows.start, part.rows.stop)] == list(range(tokens))
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1
    assert [part.index for part in parts] == list(range(chunks))


@given(tokens=st.lists(st.integers(0, 100), min_size=1, max_size=64), limit=st.integers(1, 150), padded=st.booleans())
def test_no_pass_has_more_tokens_than_the_limit(tokens: list[int], limit: int, padded: bool) -> None:
    chunks = chunk_count(tokens, limit, padded=padded)
    sizes = [[part.rows.stop - part.rows.start for part in split(t, chunks)] for t in tokens]
    passes = [len(of_ranks) * max(of_ranks) if padded else sum(of_ranks) for of_ranks in zip(*sizes, strict=True)]
    assert 1 <= chunks <= max(1, *tokens)
    assert max(passes) <= max(limit, len(tokens)), "or one token of each rank"
    if chunks > 1:
        fewer = [-(-t // (chunks - 1)) for t in tokens]
        assert limit < (len(tokens) * max(fewer) if padded else sum(fewer)), "no more chunks than it takes"


def test_first_and_last_are_meant_within_the_iteration() -> None:
    flags = [(part.first, part.last) for part in split(4, 3, first=False, last=True)]
    assert flags == [(False, False), (False, False), (False, True)]
    assert [(p.first, p.last) for p in split(0, 1)] == [(True, True)]


def test_without_a_limit_there_is_one_pass() -> None:
    assert chunk_count([10**6], None, padded=True) == 1
    assert chunk_count([0, 0], 4, padded=True) == 1
    assert chunk_count([5, 0], 4, padded=False) == 2
    assert chunk_count([5, 0], 4, padded=True) == 3


def test_even_chunks_run_on_the_overlap_stream_and_odd_ones_on_the_callers() -> None:
    device = get_device("cpu", NullSink())
    overlap, seen = device.stream(AuxStreamType.MoeChunkingOverlap), list[str]()
    streams = ChunkStreams(device, overlap)
    streams.each(split(4, 3), lambda _: seen.append(device.current.name))
    streams.each(split(4, 1), lambda _: seen.append(device.current.name))
    assert seen == ["MoeChunkingOverlap", "Main", "MoeChunkingOverlap", "Main"]


# -- layers ----------------------------------------------------------------------------------------------------------


class Counts(Watch):
    """Also keeps the reduced counts, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[list[int]] = []

    def reduced(self, layer: int, counts: Any, balancedness: float) -> None:
        self.counts.append(counts.tolist())


def _layer(device: Device, layer: int = 0, **options: Any) -> WideEPMoE:
    shape = MoeShape(EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, torch.float32)
    moe = WideEPMoE(SuppliedMoeRoutingMethod(TOP_K), shape, device, layer_idx=layer, **options)
    moe.load_weights(lambda expert: expert_weights(expert, layer))
    return moe


def _tokens(rank: int, iteration: int) -> int:
    return 0 if (rank + iteration) % 3 == 2 else 7 + 2 * rank


def _run(rank: int, size: int, dispatch: str, statistics: str, limit: int | None, repeats: int) -> dict[str, Any]:
    """Ten iterations of two layers, the second of which runs `repeats` times."""
    sink = ListSink()
    device = CpuDevice(sink, seed=3, rank=rank, check_order=True)
    groups = [dist.new_group(list(range(size))) if size > 1 else None for _ in range(3)]
    watch = Counts()
    balancer = MoeLoadBalancer(rank, size, 2, device=device, group=groups[0], probe=watch)
    errors, wanted = [], list[list[int]]()
    with balancer:
        layers = []
        for layer in range(2):
            moe_load_balancer_set_repeated_for_next_layer(repeats if layer else 1)
            moe = _layer(
                device, layer, ep_group=groups[1], statistics_group=groups[2], num_slots=8, dispatch=dispatch,
                statistics=statistics, moe_max_num_tokens=limit,
            )  # fmt: skip
            moe.probe = watch
            layers.append(moe)
    balancer.finalize_model()
    try:
        for iteration in range(10):
            table = [_tokens(r, iteration) for r in range(size)]
            with MoeLoadBalancerIterContext(balancer, True, True):
                for index, moe in enumerate(layers):
                    counts = torch.zeros(EXPERTS, dtype=torch.int64)
                    for repeat in range(repeats if index else 1):
                        step = 100 * iteration + 10 * index + repeat
                        for r in range(size):
                            ids = tokens_of(r, table[r], step=step)[2]
                            counts += torch.bincount(ids.flatten(), minlength=EXPERTS)
                        x, logits, ids = tokens_of(rank, table[rank], step=step)
                        assert isinstance(moe.routing_method, SuppliedMoeRoutingMethod)
                        moe.routing_method.supply(ids)
                        y = moe(x, logits, table if iteration % 2 else None)
                        assert watch.seen is not None
                        assert torch.equal(watch.seen[1], ids)
                        exact = reference(x, ids, watch.seen[2], index)
                        errors.append(float((y.double() - exact).abs().max() / exact.abs().max()) if len(x) else 0.0)
                    wanted.append(counts.tolist())
    finally:
        balancer.shutdown()
    unordered = [record for record in sink.records if record[0] is Kind.UNORDERED]
    return {
        "error": max(errors), "counts": watch.counts, "wanted": wanted, "commits": watch.commits,
        "unordered": unordered, "streams": sorted({s for k, s, _ in sink.records if k is Kind.EXPERTS and s != HOST}),
    }  # fmt: skip


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize(("dispatch", "statistics"), PATHS)
def test_chunks_and_repeats_count_once_and_compute_right_while_experts_move(
    dispatch: str, statistics: str, repeats: int
) -> None:
    for seen in run_ranks(_run, 2, dispatch, statistics, 5, repeats):
        assert seen["error"] <= 1e-5
        assert seen["counts"] == seen["wanted"], "empty chunks, padding and repeats are counted exactly"
        assert seen["commits"] >= 10
        assert seen["unordered"] == []
        assert seen["streams"] == [0, 3], "chunks ran on both streams"


@pytest.mark.parametrize(("dispatch", "statistics"), PATHS)
def test_one_rank_takes_chunks_too(dispatch: str, statistics: str) -> None:
    seen = _run(0, 1, dispatch, statistics, 2, 2)
    assert seen["error"] <= 1e-5
    assert seen["counts"] == seen["wanted"]
    assert seen["unordered"] == []


@pytest.mark.parametrize("backend", ["grouped", "fused"])
def test_local_backends_take_chunks(backend: str) -> None:
    sink = ListSink()
    device = CpuDevice(sink, seed=1, check_order=True)
    options: dict[str, Any] = {
        "num_experts": EXPERTS, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "dtype": torch.float32,
        "device": device, "backend": backend,
    }  # fmt: skip
    whole, chunked = (
        create_moe(SuppliedMoeRoutingMethod(TOP_K), **options, moe_max_num_tokens=limit) for limit in (None, 3)
    )
    x, logits, ids = tokens_of(0, 8)
    outputs = []
    for moe in (whole, chunked):
        moe.load_weights(expert_weights)
        assert isinstance(moe.routing_method, SuppliedMoeRoutingMethod)
        moe.routing_method.supply(ids)
        outputs.append(moe(x, logits))
    assert torch.allclose(*outputs, atol=1e-6)
    assert [stream for kind, stream, _ in sink.records if kind is Kind.EXPERTS] == [0, 3, 0, 3]


# -- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forgotten", ["begin", "end"])
def test_a_join_that_is_left_out_is_recorded(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the first join a chunk would read what is not there yet, without the second its result is used early."""
    wait = CpuDevice.wait

    def forgetful(self: CpuDevice, stream: Any, event: Any) -> None:
        mine = event.name == ("Main" if forgotten == "begin" else "MoeChunkingOverlap")
        if not (mine and event.stream is (self.main if forgotten == "begin" else event.stream)):
            wait(self, stream, event)

    sink = ListSink()
    device = CpuDevice(sink, seed=1, check_order=True)
    layers = [_layer(device, layer, moe_max_num_tokens=3) for layer in range(2)]
    monkeypatch.setattr(CpuDevice, "wait", forgetful)
    for moe in layers:
        x, logits, ids = tokens_of(0, 6)
        assert isinstance(moe.routing_method, SuppliedMoeRoutingMethod)
        moe.routing_method.supply(ids)
        moe(x, logits)
    found = [(stream, Kind(a)) for kind, stream, a in sink.records if kind is Kind.UNORDERED]
    assert found, "the next layer's top-k did not wait for the chunks before"


def test_an_exception_in_a_repeat_leaves_the_next_iteration_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    device = get_device("cpu", NullSink(), seed=1)
    balancer = MoeLoadBalancer(0, 1, 1, device=device, options=BalancerOptions(commit_delay=2))
    with balancer:
        moe_load_balancer_set_repeated_for_next_layer(3)
        moe = _layer(device, moe_max_num_tokens=3)
    method = moe.routing_method
    assert isinstance(method, SuppliedMoeRoutingMethod)
    balancer.finalize_model()
    x, logits, ids = tokens_of(0, 6)

    def iterate(times: int) -> None:
        with MoeLoadBalancerIterContext(balancer, True, True):
            for repeat in range(3):
                if repeat == times:
                    monkeypatch.setattr(moe.experts, "grouped_ffn", lambda *_, **_options: 1 / 0)
                method.supply(ids)
                moe(x, logits)

    try:
        with pytest.raises(ZeroDivisionError):
            iterate(1)
        monkeypatch.undo()
        for _ in range(3):
            iterate(3)
    finally:
        balancer.shutdown()


def test_a_repeat_that_is_missing_is_named() -> None:
    device = get_device("cpu", NullSink(), seed=1)
    balancer = MoeLoadBalancer(0, 1, 1, device=device, options=BalancerOptions(commit_delay=2))
    with balancer:
        moe_load_balancer_set_repeated_for_next_layer(2)
        moe = _layer(device)
    balancer.finalize_model()
    x, logits, ids = tokens_of(0, 6)
    assert isinstance(moe.routing_method, SuppliedMoeRoutingMethod)
    moe.routing_method.supply(ids)
    try:
        with pytest.raises(Exception, match="E125"), MoeLoadBalancerIterContext(balancer, True, True):
            moe(x, logits)
    finally:
        balancer.shutdown()


@pytest.mark.parametrize("table", [[5], [6, 6], []])
def test_a_table_of_tokens_that_does_not_fit_is_refused(table: list[int]) -> None:
    moe = _layer(get_device("cpu", NullSink()), moe_max_num_tokens=4)
    x, logits, _ = tokens_of(0, 6)
    with pytest.raises(BalancerError, match="E156"):
        moe(x, logits, table)


def test_chunks_need_their_stream() -> None:
    device = get_device("cpu", NullSink())
    streams = {AuxStreamType.MoeBalancer: device.stream(AuxStreamType.MoeBalancer)}
    with pytest.raises(BalancerError, match=r"E140(.|\n)*MoeChunkingOverlap: device"):
        _layer(device, aux_stream_dict=streams, moe_max_num_tokens=4)
    _layer(device, aux_stream_dict=streams)


# -- the tokens of all ranks -----------------------------------------------------------------------------------------


@given(tokens=st.lists(st.integers(0, 60), min_size=1, max_size=1), limit=st.none() | st.integers(1, 30))
def test_a_rank_on_its_own_knows_the_tokens_of_every_chunk(tokens: list[int], limit: int | None) -> None:
    splitter = Splitter(get_device("cpu", NullSink()), 0, Ranks(None), limit, padded=True)
    for given_table in (None, tokens):
        chunks = splitter.chunks(tokens[0], given_table, first=True, last=True)
        assert [chunk.tokens for chunk in chunks] == [(chunk.rows.stop - chunk.rows.start,) for chunk in chunks]
        assert sum(chunk.rows.stop - chunk.rows.start for chunk in chunks) == tokens[0]


class _Ranks(Ranks):
    """A rank among several that never talks to them."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(None)
        self.rank, self.size = rank, size


@given(table=st.lists(st.integers(0, 60), min_size=2, max_size=4), limit=st.none() | st.integers(1, 30))
def test_every_rank_says_the_same_of_the_chunks_of_all(table: list[int], limit: int | None) -> None:
    by_rank = []
    for rank, tokens in enumerate(table):
        splitter = Splitter(get_device("cpu", NullSink()), 0, _Ranks(rank, len(table)), limit, padded=False)
        chunks = splitter.chunks(tokens, table, first=True, last=True)
        assert all(c.tokens is not None and c.tokens[rank] == c.rows.stop - c.rows.start for c in chunks)
        by_rank.append([chunk.tokens for chunk in chunks])
    assert all(told == by_rank[0] for told in by_rank)


def test_nobody_knows_the_tokens_of_other_ranks_who_were_not_told() -> None:
    splitter = Splitter(get_device("cpu", NullSink()), 0, _Ranks(0, 2), None, padded=False)
    assert [chunk.tokens for chunk in splitter.chunks(5, None, first=True, last=True)] == [None]
    with pytest.raises(BalancerError, match="E156"):
        splitter.chunks(5, [4, 5], first=True, last=True)
