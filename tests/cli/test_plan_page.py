"""The page of plans: one file that asks for nothing, holds the figures, and no markup of a name."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from eplbctl.render.html import digest
from eplbctl.render.png import png
from moe_eplb.planning.heat import LEVELS, slot_levels
from moe_eplb.planning.problem import EMPTY, Problem, Solution

from .conftest import Call
from .test_html import Elements

SIZE = ("--ranks", "4", "--slots", "24")


@pytest.fixture
def loads(tmp_path: Path) -> Path:
    counts = np.random.default_rng(0).poisson(300, (2, 3, 16))
    path = tmp_path / "<script>alert(1)<\u202eb>&.npz"
    np.savez(path, counts=counts, layer_ids=[3, 4, 7])
    return path


def test_the_page_holds_the_figures_and_asks_for_nothing(call: Call, loads: Path) -> None:
    policies = ("--policy", "static,greedy,refine")
    answer = call("plan", str(loads), *SIZE, *policies, "--format", "html")
    assert answer.code == 0, answer.err
    page = Elements(answer.out)
    said = " ".join(" ".join(page.said).split())
    for plan in json.loads(call("plan", str(loads), *SIZE, *policies, "--format", "json").out)["plans"]:
        for value in (plan["policy"], f"{plan['balancedness']:.4f}", f"{plan['layers'][2]['largest']:,.1f}"):
            assert value in said
    assert len(page.of("img")) == 3
    (policy,) = [meta["content"] or "" for meta in page.of("meta") if meta.get("http-equiv")]
    assert digest(page.styles[0]) in policy
    assert "default-src 'none'" in policy
    addresses = [value or "" for _, found in page.found for name, value in found.items() if name in ("src", "href")]
    assert all(address.startswith("data:") for address in addresses)


def test_names_are_no_markup(call: Call, loads: Path) -> None:
    page = Elements(call("plan", str(loads), *SIZE, "--format", "html").out)
    assert page.scripts == []
    assert page.of("script") == []
    assert "<script>alert(1)" in "".join(page.said)
    assert "\u202e" not in "".join(page.said)


def test_levels_by_hand() -> None:
    """An even share is 10: loads 40, 10, 0 and an empty slot on two ranks."""
    problem = Problem(np.array([[40.0, 10.0, 0.0]]), 2, 6, slots_per_rank=(3, 3))
    slots = np.array([[0, 1, EMPTY, 2, 0, 1]], np.int32)  # 20, 5, -, 0, 20, 5
    (row,) = slot_levels(problem, Solution("by hand", slots, 0.0))
    assert list(row) == [LEVELS // 2 + 4, LEVELS // 2 - 4, 0, 0, LEVELS // 2 + 4, LEVELS // 2 - 4]


def test_a_picture_is_what_the_format_says() -> None:
    picture = png([b"\0\1\1", b"\1\0\0"], [(1, 2, 3), (250, 0, 9)])
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    parts, at = {}, 8
    while at < len(picture):
        (length,) = struct.unpack(">I", picture[at : at + 4])
        kind, content = picture[at + 4 : at + 8], picture[at + 8 : at + 8 + length]
        assert struct.unpack(">I", picture[at + 8 + length : at + 12 + length]) == (zlib.crc32(kind + content),)
        parts[kind] = content
        at += 12 + length
    assert struct.unpack(">IIBB", parts[b"IHDR"][:10]) == (3, 2, 8, 3)
    assert parts[b"PLTE"] == bytes([1, 2, 3, 250, 0, 9])
    assert zlib.decompress(parts[b"IDAT"]) == b"\0\0\1\1\0\1\0\0"
