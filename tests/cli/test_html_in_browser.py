"""The page in a real browser: it draws, answers hands and keys, asks for nothing, and runs nothing a trace says."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from eplbctl.render.html import page
from eplbctl.render.palette import ROLES, SCHEMES
from moe_eplb.analysis.capture import Capture
from moe_eplb.core.events import Role
from tests.cli.html_browser import Browser, missing, started
from tests.cli.html_captures import HOSTILE, hostile, large, report_on, small

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "everything is here")

Open = Callable[..., Browser]

_PLACES = """
const p = eplbTimeline.picture, [rank, name, time, down] = arguments;
const band = p.layout.bands.find(b => b.rank === rank && b.name === name);
const box = p.canvas.getBoundingClientRect(), x = p.x(time), y = p.y(band) + down;
const one = document.createElement("canvas"), context = one.getContext("2d", {willReadFrequently: true});
one.width = one.height = 1;
context.drawImage(p.canvas, Math.floor(x), Math.floor(y), 1, 1, 0, 0, 1, 1);
return {x: box.left + x, y: box.top + y, pixel: Array.from(context.getImageData(0, 0, 1, 1).data).slice(0, 3)};
"""
_TICKS = """
const said = [], proto = CanvasRenderingContext2D.prototype, fillText = proto.fillText, p = eplbTimeline.picture;
proto.fillText = function (text, x, y, room) {
  const width = Math.min(this.measureText(text).width, room || Infinity);
  if (this === p.context) said.push({text, x, y, width, align: this.textAlign});
  return fillText.apply(this, arguments);
};
p.draw();
proto.fillText = fillText;
return said;
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with started() as one:
        yield one


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Open the page of a capture; afterwards nothing may have gone wrong on it, and nothing been asked for."""

    def open_page(capture: Capture, **more: Any) -> Browser:
        path = tmp_path / "report.html"
        path.write_text(page(report_on(capture), capture, more.pop("title", "A title"), **more), encoding="utf-8")
        browser.open(path)
        browser.js("document.getElementById('picture').scrollIntoView()")
        browser.drawn()
        return browser

    browser.size(1300)
    browser.scheme("light")
    yield open_page
    assert browser.dialog() is None
    assert browser.errors() == []
    asked = browser.requests()
    assert [url for url in asked if not url.startswith(("file://", "data:"))] == []
    assert len([url for url in asked if url.startswith("file://")]) <= 1


def rgb(colour: str) -> list[int]:
    return [int(colour[at : at + 2], 16) for at in (1, 3, 5)]


def view(browser: Browser) -> tuple[float, float]:
    browser.drawn()
    start, end = browser.js("return [eplbTimeline.picture.from, eplbTimeline.picture.to]")
    return start, end


def at(browser: Browser, rank: int, lane: str, time_ns: float, down: int = 4) -> dict[str, Any]:
    found: dict[str, Any] = browser.js(_PLACES, rank, lane, time_ns, down)
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_each_lane_shows_the_colours_of_its_roles(opened: Open, browser: Browser, scheme: str) -> None:
    browser.scheme(scheme)
    opened(small())
    for rank in (0, 1):
        base = rank * 1000
        for lane, moment, role in (
            ("Main", 30_000, Role.COMPUTE), ("Main", 80_000, Role.COMM), ("MoeBalancer", 30_000, Role.EPLB_STATISTIC),
            ("Main", 250_000, Role.COMPUTE), ("MoeBalancer", 130_000, Role.EPLB_STATISTIC),
        ):  # fmt: skip
            assert at(browser, rank, lane, base + moment)["pixel"] == rgb(getattr(ROLES[role], scheme))
        strip = [at(browser, rank, "exposed", base + 60_000 + part, 3)["pixel"] for part in range(200, 10_000, 900)]
        assert rgb(SCHEMES[scheme].exposed) in strip
        assert at(browser, rank, "exposed", base + 58_000, 3)["pixel"] != rgb(SCHEMES[scheme].exposed)
    free = at(browser, 0, "Main", 97_000)["pixel"]
    assert free in (rgb(SCHEMES[scheme].background), rgb(SCHEMES[scheme].stripe))
    assert browser.js("return getComputedStyle(document.body).backgroundColor") == "rgb({}, {}, {})".format(
        *rgb(SCHEMES[scheme].background)
    )


def test_hovering_tells_what_lies_there(opened: Open) -> None:
    browser = opened(small())
    place = at(browser, 1, "MoeBalancer", 131_000)
    browser.mouse("mouseMoved", place["x"], place["y"])
    browser.until("!document.getElementById('tip').hidden")
    said = browser.text("tip")
    for text in ("histogram", "eplb_statistic", "start121 µs", "duration20 µs", "iteration1", "layer0"):
        assert text in said
    assert "rank 1, MoeBalancer, stream 9 of device 0" in said
    box = browser.js(
        "const b = document.getElementById('tip').getBoundingClientRect(); return [b.left, b.right, b.top]"
    )
    assert 0 <= box[0] < box[1] <= 1300
    free = at(browser, 0, "Main", 97_000)
    browser.mouse("mouseMoved", free["x"], free["y"])
    browser.until("document.getElementById('tip').hidden")


def test_a_click_holds_an_event(opened: Open) -> None:
    browser = opened(small())
    place = at(browser, 0, "Main", 10_000)
    for kind in ("mousePressed", "mouseReleased"):
        browser.mouse(kind, place["x"], place["y"], button="left", clickCount=1)
    browser.until("document.getElementById('picked').textContent.includes('gemm')")


def test_the_wheel_zooms_around_the_cursor(opened: Open) -> None:
    browser = opened(small())
    before, place = view(browser), at(browser, 0, "Main", 150_000)
    browser.mouse("mouseWheel", place["x"], place["y"], deltaX=0, deltaY=-240)
    browser.until(f"eplbTimeline.picture.to - eplbTimeline.picture.from < {0.8 * (before[1] - before[0])}")
    assert at(browser, 0, "Main", 150_000)["x"] == pytest.approx(place["x"], abs=1)
    assert "In view" in browser.text("range")
    closer = view(browser)
    browser.mouse("mouseWheel", place["x"], place["y"], deltaX=0, deltaY=240)
    browser.until(f"eplbTimeline.picture.to - eplbTimeline.picture.from > {1.2 * (closer[1] - closer[0])}")


def test_dragging_pans(opened: Open) -> None:
    browser = opened(small())
    browser.js("eplbTimeline.look(100000, 200000)")
    before, place = view(browser), at(browser, 0, "Main", 150_000)
    browser.mouse("mousePressed", place["x"], place["y"], button="left", clickCount=1)
    for step in (40, 80, 120):
        browser.mouse("mouseMoved", place["x"] + step, place["y"], button="left", buttons=1)
    browser.mouse("mouseReleased", place["x"] + 120, place["y"], button="left", clickCount=1)
    after = view(browser)
    assert after[1] - after[0] == pytest.approx(before[1] - before[0])
    assert at(browser, 0, "Main", 150_000)["x"] == pytest.approx(place["x"] + 120, abs=2)
    assert browser.text("picked") == ""


def test_keys_zoom_pan_and_show_all(opened: Open) -> None:
    browser = opened(small())
    everything = view(browser)
    browser.js("document.getElementById('timeline').focus({preventScroll: true})")
    browser.key("+")
    closer = view(browser)
    assert closer[1] - closer[0] == pytest.approx((everything[1] - everything[0]) / 1.5)
    browser.key("ArrowRight")
    moved = view(browser)
    assert moved[0] > closer[0]
    browser.key("ArrowLeft")
    assert view(browser)[0] == pytest.approx(closer[0])
    browser.key("-")
    assert view(browser)[1] - view(browser)[0] == pytest.approx(everything[1] - everything[0])
    browser.js("eplbTimeline.look(100000, 100100)")
    for key in ("0", "Home"):
        browser.key(key)
        start, end = view(browser)
        assert start <= 0
        assert end >= 296_000
    browser.key("n")
    assert "Exposed stretch 1 of 6" in browser.text("said")
    assert browser.js("return getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_a_listed_stretch_is_jumped_to(opened: Open) -> None:
    browser = opened(small())
    one = report_on(small()).exposed[2]
    browser.js("document.querySelector('[data-stretch=\"2\"]').click()")
    start, end = view(browser)
    assert start < one.start < one.end < end
    assert end - start < 10 * one.length
    assert browser.js("return document.querySelector('[data-stretch=\"2\"]').getAttribute('aria-pressed')") == "true"
    strip = [at(browser, one.rank, "exposed", one.start + part, 3)["pixel"] for part in range(0, one.length, 500)]
    assert rgb(SCHEMES["light"].exposed) in strip


def test_a_search_dims_the_rest_and_walks_through_hits(opened: Open) -> None:
    browser = opened(small())
    browser.js("const s = document.getElementById('search'); s.value = 'HISTO'; s.dispatchEvent(new Event('input'))")
    browser.drawn()
    assert "6 events of 1 names" in browser.text("found")
    assert at(browser, 0, "Main", 30_000)["pixel"] != rgb(ROLES[Role.COMPUTE].light)
    assert at(browser, 0, "MoeBalancer", 30_000)["pixel"] == rgb(ROLES[Role.EPLB_STATISTIC].light)
    browser.js("document.getElementById('search').focus()")
    browser.key("Enter")
    browser.until("document.getElementById('picked').textContent.includes('histogram')")


def test_the_map_tells_its_cells_and_leads_to_them(opened: Open) -> None:
    browser = opened(small())
    browser.js("document.getElementById('map').focus()")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        browser.key(key)
    assert "layer 1, iteration 1: 20 µs of 20 µs exposed, 0.0 % hidden" in browser.text("map-said")
    browser.key("Enter")
    start, end = view(browser)
    assert (start, end) == (pytest.approx(100_000), pytest.approx(191_000))


@pytest.mark.parametrize("width", [1300, 420])
def test_labels_of_the_axis_never_overlap(opened: Open, browser: Browser, width: int) -> None:
    browser.size(width)
    opened(small())
    for start, end in ((0, 300_000), (0, 296_000), (99_990, 100_010), (123_456, 133_456), (50_000, 250_001)):
        browser.js("eplbTimeline.look(arguments[0], arguments[1])", start, end)
        browser.drawn()
        said = browser.js(_TICKS)
        ticks = [one for one in said if one["y"] == 10]
        assert len(ticks) >= 1
        assert all(text["text"].rpartition(" ")[2] in ("ns", "µs", "ms", "s") for text in ticks)
        for height in (10, 30):
            boxes = sorted(
                (one["x"] - one["width"] * (0.5 if one["align"] == "center" else 0), one["width"])
                for one in said
                if one["y"] == height
            )
            assert all(a[0] + a[1] < b[0] for a, b in pairwise(boxes))
    assert browser.js("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_names_of_lanes_fit(opened: Open) -> None:
    browser = opened(hostile())
    room = browser.js("return eplbTimeline.picture.gutter")
    said = [one for one in browser.js(_TICKS) if one["x"] == 18]
    assert len(said) >= len(HOSTILE)
    assert all(one["x"] + one["width"] <= room for one in said)


def test_hostile_names_are_inert(opened: Open) -> None:
    browser = opened(hostile(), title=HOSTILE["script"])
    counted = browser.js(
        "return ['script', 'img', 'iframe', 'object', 'link'].map(tag => document.querySelectorAll(tag).length)"
    )
    assert counted == [2, 0, 0, 0, 1]
    assert browser.js("return document.title") == HOSTILE["script"]
    names = browser.js("return eplbTimeline.data.names")
    assert any("<script>alert(1)</script>" in name for name in names)
    assert all(name.isprintable() for name in names)
    assert any(name.endswith("(10000 characters)") for name in names)
    assert "\\u202e" in "".join(names)
    for number in range(len(HOSTILE)):
        place = at(browser, 0, str(names_of_lanes(browser)[number]), number * 1000 + 400)
        browser.mouse("mouseMoved", place["x"], place["y"])
        browser.until("!document.getElementById('tip').hidden")
        assert browser.js("return document.getElementById('tip').querySelectorAll('script, img, a').length") == 0
    box = browser.js("const b = document.getElementById('tip').getBoundingClientRect(); return [b.width, b.height]")
    assert box[0] < 600
    assert box[1] < 500
    assert browser.js("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def names_of_lanes(browser: Browser) -> list[str]:
    """Names of the streams by their numbers."""
    of_number = "l => l.kind === 'stream').sort((a, b) => a.number - b.number"
    names: list[str] = browser.js(f"return eplbTimeline.lanes.filter({of_number}).map(l => l.name)")
    return names


def test_a_hundred_thousand_events_stay_usable(opened: Open) -> None:
    began = time.monotonic()
    browser = opened(large())
    assert time.monotonic() - began < 30
    spent = []
    for number in range(12):
        start = number * 6_000_000
        browser.js("eplbTimeline.look(arguments[0], arguments[1])", start, start + (100_000_000 >> number % 6))
        browser.drawn()
        spent.append(browser.js("return eplbTimeline.picture.frame.ms"))
    assert browser.js("return eplbTimeline.lanes.reduce((sum, lane) => sum + lane.start.length, 0)") == 100_000
    assert statistics.median(spent) < 200
    browser.js("eplbTimeline.look(50_000_000, 50_020_000)")
    browser.drawn()
    place = at(browser, 0, "stream 0", 50_000_300)
    browser.mouse("mouseMoved", place["x"], place["y"])
    browser.until("!document.getElementById('tip').hidden")
    assert "kernel 0" in browser.text("tip")
    assert "start50 ms" in browser.text("tip")
