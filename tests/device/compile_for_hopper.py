"""Compiles kernels down to Hopper's machine code, which takes no GPU; an error ends it."""

from __future__ import annotations

from itertools import product
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe_eplb.device.control import triton_all, triton_control, triton_load
from moe_eplb.device.ops import (
    triton_choose,
    triton_ffn,
    triton_fp8,
    triton_group,
    triton_group_few,
    triton_rows,
    triton_sends,
)

HOPPER = GPUTarget("cuda", 90, 32)
NUMBERS = (
    "count", "width", "groups", "hidden_stride", "capacity", "layer", "following", "experts", "delay", "layers", "kept",
    "ranks", "timeout_ns", "tokens", "per_rank", "width1", "width2", "width3", "words", "rank", "most", "rows",
    "stride", "scale_stride", "mark_stride", "tables_size", "cells_size",
)  # fmt: skip
COUNTS = dict.fromkeys(NUMBERS, "i32")
SHARED_BYTES = 232_448
"""Of one block at most."""


def build(kernel: Any, warps: int, types: dict[str, str], aligned: tuple[str, ...] = (), **constants: Any) -> str:
    """PTX of a kernel; machine code is made on the way. `aligned` arguments are multiples of 16."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else (COUNTS | types)[name] for name in names}
    known = {(names.index(name),): value for name, value in constants.items()}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=known, attrs=attributes)
    compiled = triton.compile(source, target=HOPPER, options={"num_warps": warps})
    assert compiled.metadata.shared <= SHARED_BYTES, f"{kernel} takes {compiled.metadata.shared} bytes a block"
    text: str = compiled.asm["ptx"]
    return text


def main() -> None:
    """All dtypes of rows, with ends of groups and without; then the pointer is another tensor's."""
    for rows in ("*bf16", "*fp32"):
        for bounded in (True, False):
            swiglu = {"rows": rows, "result": rows, "offs": "*i32" if bounded else rows}
            build(triton_rows._swiglu, 4, swiglu, bounded=bounded, tile=8, block=512)
            fp8 = swiglu | {"result": "*fp8e4nv", "scales": "*fp32", "offs": "*i32" if bounded else "*fp32"}
            text = build(triton_fp8._swiglu_fp8, 8, fp8, bounded=bounded, tile=2, block=2048)
            assert "e4m3x2.f32" in text, "not rounded to fp8"
        spread = {"hidden": rows, "position": "*i32", "rows": "*fp8e4nv", "scales": "*fp32"}
        text = build(triton_fp8._spread_rows, 16, spread, top_k=8, block=8192)
        assert "e4m3x2.f32" in text, "not rounded to fp8"
        assert "div.rn.f32" in text, "not divided as the plain twin does"
    sends()
    entries()
    products()
    words = dict.fromkeys(("turn", "due", "decision", "stages", "handed", "reports", "message", "recent"), "*i64")
    words |= dict.fromkeys(("folded", "reduced", "ready", "overdue", "overflow", "lanes", "committed"), "*i64")
    words |= dict.fromkeys(("turns", "coming", "begun"), "*i64")
    words |= dict.fromkeys(("rung", "bell", "counts"), "*i32")
    words |= {"load": "*fp32", "handed_load": "*fp32", "decay": "fp32"}
    for hand_over, constants in ((triton_load._hand_over, {}), (triton_all._hand_over_all, {"layers": 58})):
        text = build(hand_over, 4, words, block=256, releases=True, **constants)
        assert "atom." not in text, "an atomic operation on host memory, which not every GPU supports"
        assert "bar.sync" in text[text.index("st.global") : text.index("st.release.sys")], (
            "not behind what all threads store"
        )
    assert text.count("bar.sync") == 2, "the next layer's part reads what the one before may not have stored yet"
    for text in (
        build(triton_all._vote_all, 1, words, block=256, spin=True),
        build(triton_control._vote, 4, words, block=256, spin=True, early=False),
    ):
        assert "ld.acquire.sys" in text, "what is published behind the word may be read before it"
        assert "bar.sync" not in text, "warps that end their wait apart wait for each other"
    for window in (1, 4):
        text = build(triton_control._vote_and_fold, 8, words, window=window, block=256, spin=True)
        settles = text.index("bar.sync")
        assert "ld.acquire.sys" in text[:settles], "what is published behind the word may be read before it"
        assert "st.global" in text[:settles], "what is settled may not have been written yet"
        build(triton_all._settle_and_fold_all, 4, words, window=window, block=256)
        build(triton_load._fold, 4, words, rows=8, window=window, block=256)
    text = build(triton_control._look_ahead, 1, words, block=64, acquires=True)
    assert text.rindex("ld.acquire.sys") < text.index("shfl.sync"), "each thread goes by what itself has read"
    assert text.rindex("shfl.sync") < text.index("ld.volatile"), "the row may be read before its number"
    tables = {"tables": "*i32", "cells": "*i32", "pending": "*i32"}
    for begins in (False, True):
        build(triton_control._take_over, 8, words | tables, block=1024, begins=begins)


def sends() -> None:
    """Rows that go only to the ranks that need them."""
    names = ("slot_ids", "place", "token_at", "first", "second", "third", "integers", "slots", "token", "marks")
    words = dict.fromkeys(names, "*i32") | {"scales": "*fp32", "checked": "*fp32"}
    build(triton_sends._order_sends, 4, words, top_k=8, tiles=2, tile=1024)
    build(triton_sends._send_rows, 4, words | {"rows": "*i32"}, block=1024)
    build(triton_sends._arrive, 4, words, top_k=6, columns=8, tile=32)
    for hidden in ("*bf16", "*fp32"):
        build(triton_sends._add_returned, 4, words | {"hidden": hidden, "total": hidden}, ranks=8, block=1024)


def products() -> None:
    """The experts' products of few rows, whose weights are the wide side of the matrix instruction."""
    types = {"rows": "*bf16", "weights": "*bf16", "parts": "*i32", "result": "*bf16", "cells": "i32"}
    for gated, rows in product((True, False), (16, 32, 64, 128)):
        cut = triton_ffn.tiles(rows, gated=gated)
        sizes = {"part_rows": cut.rows, "results": cut.results, "block": cut.depth, "stages": cut.stages}
        for whole in (True, False):
            constants = {"depth": 2048, "gated": gated, "whole": whole, **sizes}
            text = build(triton_ffn._products, cut.warps, types, ("rows", "weights", "result", "width"), **constants)
            assert "bar.sync" not in text[: text.index("cp.async")], "a program waits before it reads weights"
            assert "cp.async.cg.shared.global" in text, "what is copied one element at a time is not copied ahead"
            assert f"wgmma.mma_async.sync.aligned.m64n{cut.rows}k16.f32.bf16.bf16" in text


def entries() -> None:
    """Expert ids, entries and their sums; numbers that are 1 become constants."""
    words = dict.fromkeys(("ids", "count", "start", "slots", "routed", "counts", "cells", "below", "first"), "*i32")
    words |= dict.fromkeys(("position", "offs", "own_cells", "parts", "second", "third", "fourth"), "*i32")
    rows = dict.fromkeys(("hidden", "output", "blocks", "total", "rows"), "*bf16") | {"scales": "*fp32"}
    # Where no parts are wanted, rows stand in for what nothing reads or writes.
    parts = {0: words | rows | dict.fromkeys(("parts", "own_cells"), "*bf16"), 16: words | rows}
    every(triton_choose._histogram, words, block=1024, nbins=16)
    for ids in ("*i32", "*i64"):
        every(triton_choose._route, words | {"ids": ids}, counting=True, block=1024, tile=64, others=256)
    for top_k, block in ((1, 256), (8, 2048)):
        for mapped in (True, False):
            every(triton_group._count, words, top_k=top_k, mapped=mapped, block=128, nbins=16)
            every(triton_group._place, words, top_k=top_k, mapped=mapped, block=128)
            constants = {"top_k": top_k, "k_width": top_k, "chunk": 1024, "bins": 128, "block": block}
            for part_rows, kinds in parts.items():
                held = 128 if mapped else 0
                every(triton_group_few._small, kinds, held=held, part_rows=part_rows, **constants)
        for part_rows, kinds in parts.items():
            every(triton_group._copy_rows, kinds, top_k=top_k, part_rows=part_rows, bins=128, block=block)
        every(triton_rows._combine, words | rows, top_k=top_k, block=block)
    every(triton_group._scan, words, chunk=2048)
    every(triton_rows._add_blocks, {"blocks": "*bf16", "total": "*bf16"}, ranks=8, block=512)
    every(triton_rows._pack_rows, words | {"rows": "*i32"}, block=1024)


def every(kernel: Any, types: dict[str, str], **constants: Any) -> None:
    """Compile a kernel as it is for any numbers, and as it is where those that may be constants are 1."""
    numbers = [p.name for p in kernel.params if p.name not in types and p.name not in constants]
    ones = {p.name: 1 for p in kernel.params if p.name in numbers and not p.do_not_specialize}
    types = dict.fromkeys(numbers, "i32") | types
    build(kernel, 4, types, **constants)
    build(kernel, 4, types, **constants, **ones)


if __name__ == "__main__":
    main()
