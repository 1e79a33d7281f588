"""The page as text: one file that asks for nothing, allows only its own script, and holds no markup of a trace."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest

from eplbctl.render.html import page
from eplbctl.render.inert import inert
from moe_eplb.analysis.capture import Capture
from moe_eplb.analysis.readers.any import read_captures
from moe_eplb.analysis.roles import prepare
from moe_eplb.analysis.selection import Selection
from moe_eplb.analysis.trace_report import make_trace_report
from tests.analysis.captures import MakeCapture
from tests.cli.html_captures import HOSTILE, hostile, large, report_on, small

GOOD = Path(__file__).parents[2] / "traces" / "good" / "two_ranks_local_ids"


class Elements(HTMLParser):
    """Every element with its attributes, the text outside of scripts and styles, and the scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.said: list[str] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        kind = {"script": self.scripts, "style": self.styles}.get(self.cdata_elem or "", self.said)
        kind.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.found if found == tag]


def page_of(capture: Capture, title: str = "A title") -> str:
    return page(report_on(capture), capture, title)


def data_of(text: str) -> dict:  # type: ignore[type-arg]
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    loaded: dict = json.loads(found[1])  # type: ignore[type-arg]
    return loaded


def test_only_its_own_script_and_style_may_run() -> None:
    elements = Elements(page_of(small()))
    (policy,) = (m["content"] or "" for m in elements.of("meta") if m.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    for rule, text in (("style-src", elements.styles[0]), ("script-src", elements.scripts[1])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    assert len(elements.of("script")) == 2
    assert len(elements.of("style")) == 1


def test_nothing_is_asked_for_from_elsewhere() -> None:
    text = page_of(small())
    for tag, attributes in Elements(text).found:
        assert not attributes.keys() & {"src", "srcset", "style", "action", "poster"}, tag
        assert not [name for name in attributes if name.startswith("on")], tag
        assert (attributes.get("href") or "#").startswith(("#", "data:")), tag
    own = Elements(text)
    for code in (own.scripts[1], own.styles[0]):
        assert not re.search(
            r"https?:|fetch\(|XMLHttp|WebSocket|sendBeacon|import\(|@import|url\(|eval\(|innerHTML", code
        )


def test_hostile_texts_are_neither_markup_nor_invisible() -> None:
    plain, text = Elements(page_of(small())), page_of(hostile(), HOSTILE["script"])
    elements = Elements(text)
    allowed = {tag for tag, _ in plain.found}
    assert {tag for tag, _ in elements.found} <= allowed
    for forbidden in ("<script>alert", "<img", "\u202e", "\x00", "\x1b", "\u2028", "<!--<"):
        assert forbidden not in text
    assert "<" not in elements.scripts[0]
    names = data_of(text)["names"]
    for kind, name in HOSTILE.items():
        assert inert(name) in names, kind
    assert any("alert(1)" in one for one in elements.said)


def test_a_page_says_what_it_was_made_from() -> None:
    capture = prepare(read_captures([GOOD]))
    said = " ".join(Elements(page(make_trace_report(capture), capture, "Title of mine")).said)
    for text in (
        "Title of mine",
        "trace.sqlite",
        "moe_eplb",
        "2 ranks",
        "0, 1 (stated)",
        "everything",
        "No check was made",
    ):
        assert text in said


def test_checks_have_badges_and_the_violation_its_neighbours() -> None:
    elements = Elements(page_of(small()))
    badges = [a["class"] for a in elements.of("span") if "badge" in (a.get("class") or "")]
    assert badges[:3] == ["badge invalid", "badge valid", "badge unknown"]
    assert "  route layer 0\n> this call" in "".join(elements.said)


def test_incomplete_and_merged_are_said() -> None:
    capture = large(1000)
    object.__setattr__(capture, "incomplete", "the last second is missing")
    assert "the last second is missing" in "".join(Elements(page_of(capture)).said)
    said = "".join(Elements(page_of(large(210_000))).said)
    assert "210000 events are drawn as" in said


def test_a_hundred_thousand_events_are_small() -> None:
    text = page_of(large())
    assert len(text.encode()) < 5_000_000
    assert sum(len(lane["start"]) for lane in data_of(text)["lanes"]) == 100_000


def test_a_selection_is_what_is_looked_at_first() -> None:
    capture, selection = small(), Selection(iterations=((1, 1),))
    made = page(make_trace_report(capture, selection), capture, "", selection)
    data = data_of(made)
    assert data["view"] == [100_000, 191_000]
    assert data["asked"] is True
    assert len(data["stretches"]) == 2
    assert "iterations 1" in "".join(Elements(made).said)


def test_the_map_has_its_sums_as_a_table() -> None:
    said = [text.strip() for text in Elements(page_of(small())).said]
    at = said.index("Exposed balancer work by layer")
    cells = [text for text in said[at:] if text][1:13]
    assert cells == ["layer", "all us", "exposed us", "hidden", "most exposed us", "in iteration", *_row_of_layer_0()]


def _row_of_layer_0() -> list[str]:
    return ["0", "120.000", "0.000", "100.0%", "0.000", "-"]


def test_a_trace_without_anything_has_a_page() -> None:
    text = page_of(MakeCapture().done())
    assert "No balancer work belongs to an iteration" in text


def test_elements_are_named_for_those_who_do_not_see_them() -> None:
    elements = Elements(page_of(small()))
    assert elements.of("html")[0]["lang"] == "en"
    for canvas in elements.of("canvas"):
        assert canvas["aria-label"]
        assert canvas["tabindex"] == "0"
    identities = [a["id"] for _, a in elements.found if a.get("id")]
    assert len(identities) == len(set(identities))
    for _, attributes in elements.found:
        for name in ("aria-labelledby", "aria-describedby", "for"):
            assert attributes.get(name, identities[0]) in identities
    assert len(elements.of("h1")) == 1
    assert all(header.get("scope") == "col" for header in elements.of("th"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("a\u202eb", "a\\u202eb"),
        ("\x00\x1b", "\\x00\\x1b"),
        ("\ud800", "\\ud800"),
        ("\U000e0041", "\\U000e0041"),
        ("日本語 é", "日本語 é"),
        ("x" * 500, "x" * 400 + "… (500 characters)"),
    ],
)
def test_inert_shows_what_cannot_be_seen(text: str, shown: str) -> None:
    assert inert(text) == shown


def test_line_breaks_can_be_kept() -> None:
    assert inert("a\nb\tc", keep="\n") == "a\nb\\x09c"


def test_templates_are_plain_text_of_the_package() -> None:
    folder = resources.files("eplbctl") / "templates"
    for name in ("report.html.j2", "report.css", "report.js", "report.data.js", "report.draw.js", "report.map.js"):
        text = (folder / name).read_text(encoding="utf-8")
        assert "\r" not in text
        assert name.endswith(".j2") or "</script" not in text
