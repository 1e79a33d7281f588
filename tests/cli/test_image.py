"""The timeline as SVG and PNG: the lanes, the colours of roles, and names that stay names."""

from __future__ import annotations

import io
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from eplbctl.render import image
from eplbctl.render.palette import RANGE, ROLES, SCHEMES, contrast, ink_on
from moe_eplb.core.errors import ExitCode, UsageError
from moe_eplb.core.events import Role
from tests.cli.html_captures import hostile, large, report_on, small

pytest.importorskip("matplotlib", reason="matplotlib is not installed")


def svg_of(capture) -> str:  # type: ignore[no-untyped-def]
    return image.svg(report_on(capture), capture)


def texts(svg: str) -> list[str]:
    root = ElementTree.fromstring(svg)
    return ["".join(one.itertext()) for one in root.iter("{http://www.w3.org/2000/svg}text")]


def test_svg_has_lanes_axis_legend_and_colours() -> None:
    svg = svg_of(small())
    said = texts(svg)
    for text in ("rank 0   exposed", "Main", "MoeBalancer", "host", "iteration", "compute", "eplb_statistic", "gemm"):
        assert text in said
    assert "time since the trace's start, us" in said
    for role in (Role.COMPUTE, Role.COMM, Role.EPLB_STATISTIC, Role.EPLB_SIGNAL):
        assert ROLES[role].light in svg
    assert SCHEMES["light"].exposed in svg
    assert svg.count('role="img"') == 1


def test_the_same_trace_gives_the_same_bytes() -> None:
    assert svg_of(small()) == svg_of(small())
    assert "http://" not in svg_of(small()).replace("http://www.w3.org/", "").replace("http://purl.org/", "").replace(
        "http://creativecommons.org/", ""
    )


def test_png_shows_the_colours() -> None:
    from matplotlib.image import imread

    data = image.png(report_on(small()), small())
    assert data.startswith(b"\x89PNG\r\n")
    pixels = (imread(io.BytesIO(data))[:, :, :3] * 255).round().astype(int).reshape(-1, 3)
    count = {tuple(pixel) for pixel in pixels[::3].tolist()}
    for look in (ROLES[Role.COMPUTE], ROLES[Role.COMM], ROLES[Role.EPLB_STATISTIC]):
        assert tuple(int(look.light[at : at + 2], 16) for at in (1, 3, 5)) in count


def test_hostile_names_are_text() -> None:
    said = texts(svg_of(hostile()))
    assert any("<script>alert(1)" in text for text in said)
    assert all(text.isprintable() for text in said)
    assert not any("script" in one.tag.lower() for one in ElementTree.fromstring(svg_of(hostile())).iter())


def test_many_events_are_merged_and_it_says_so() -> None:
    svg = svg_of(large(50_000))
    assert any(text.startswith("50000 events are drawn as") for text in texts(svg))
    assert len(svg) < 8_000_000


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"moe-eplb\[plot\]") as caught:
        image.png(report_on(small()), small())
    assert (caught.value.code, caught.value.exit_code) == ("E074", ExitCode.USAGE)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_stand_out(scheme: str) -> None:
    shown = SCHEMES[scheme]
    for look in (*ROLES.values(), RANGE):
        colour = getattr(look, scheme)
        for ground in (shown.background, shown.stripe):
            assert contrast(colour, ground) >= 3
        if look.pattern != "outline":
            assert contrast(ink_on(colour), colour) >= 4.5
    for ink in (shown.ink, shown.faint, shown.exposed):
        for ground in (shown.background, shown.stripe):
            assert contrast(ink, ground) >= 4.5


def test_no_two_roles_look_alike() -> None:
    assert set(ROLES) == set(Role)
    for scheme in ("light", "dark"):
        looks = [(getattr(look, scheme), look.pattern) for look in (*ROLES.values(), RANGE)]
        assert len(set(looks)) == len(looks)


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
