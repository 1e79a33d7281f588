"""``eplbctl scenario``: what it writes it accepts, and what it shows is the same scenario."""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from eplbctl.commands.scenario import TEMPLATES
from moe_eplb.core import scenario as scenarios

from .conftest import SMALL, Call, Write


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_are_good_scenarios(template: str, call: Call) -> None:
    answer = call("scenario", "init", "mine.yaml", "--template", template)
    assert (answer.code, answer.out) == (0, "wrote mine.yaml\n")
    assert answer.err == "next: eplbctl run mine.yaml\n"
    checked = call("scenario", "check", "mine.yaml")
    assert checked.code == 0
    assert checked.out.startswith("mine.yaml: good")
    assert len(Path("mine.yaml").read_text().splitlines()) <= 60


def test_init_never_overwrites_unless_told(call: Call) -> None:
    Path("scenario.yaml").write_text("precious")
    assert call("scenario", "init").code == 2
    assert Path("scenario.yaml").read_text() == "precious"
    assert call("scenario", "init", "--force").code == 0
    assert Path("scenario.yaml").read_text() != "precious"


def test_check_says_when_the_balancer_is_off(call: Call, write: Write) -> None:
    text = SMALL.replace("layer_updates_per_iter: 1", "layer_updates_per_iter: 0")
    first = "scenarios/static.yaml: good (balancer: off, because static routing: layer_updates_per_iter is 0)"
    path = write("static", text)
    out = call("scenario", "check", path, "--step-ms", "1").out
    assert out.splitlines()[0] == first
    assert "slots " in out
    for pretended in ("staging", "host copies", "Moves", "GB/s", "window"):
        assert pretended not in out
    write("other", text)
    lines = call("scenario", "check", "scenarios").out.splitlines()
    assert lines == [
        "scenarios/other.yaml" + first.removeprefix("scenarios/static.yaml") + f", {OFF}",
        f"{first}, {OFF}",
    ]
    one = json.loads(call("scenario", "check", path, "--format", "json").out)["scenarios"][0]
    assert one["balancer_off"] == "static routing: layer_updates_per_iter is 0"
    assert (one["move"], one["memory"]["host_bytes"], one["memory"]["update_bytes"]) == (None, 0, 0)


# Of SMALL an expert has 1024 + 512 bytes: 2 layers x 3 slots; routers [4, 16] in float32.
OFF = "9.5 KiB a rank"


@pytest.fixture
def shared_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many bytes /dev/shm offers."""

    def offer(count: int) -> None:
        monkeypatch.setattr("os.statvfs", lambda path: SimpleNamespace(f_bavail=count, f_frsize=1))

    return offer


def test_check_tells_memory_and_moves_of_one(call: Call, write: Write, shared_memory: Callable[[int], None]) -> None:
    shared_memory(1 << 30)
    out = call("scenario", "check", write()).out
    cells = [re.split(r"  +", line)[:2] for line in out.splitlines()]
    # One update of 4608 bytes is pending at a time, and the updater may still hold the one before.
    assert cells[4:10] == [
        ["slots", "9,216"], ["routers", "512"], ["shared experts", "0"], ["staging, at most", "9,216"],
        ["host copies", "12,288"], ["host copies", "6,144"],
    ]  # fmt: skip
    assert "copies 4,608 bytes" in out
    assert "At 55 GB/s (assumed: --bandwidth) copying that takes 8.38e-05 ms." in out
    assert "1 x the time of a step, if a step takes 8.38e-05 ms or longer (--step-ms" in out
    assert "warning" not in out


def test_check_judges_moves_by_what_is_assumed(call: Call, write: Write) -> None:
    path = write("two_steps", SMALL + "name: two_steps\n")
    options = ["--set", "balancer.commit_delay=2", "--bandwidth", "0.001", "--step-ms"]  # 4.608 ms a move
    fits = call("scenario", "check", path, *options, "5").out
    assert "At 0.001 GB/s (assumed: --bandwidth) copying that takes 4.61 ms." in fits
    assert "commit_delay 2 x 5 ms (assumed: --step-ms) = 10 ms." in fits
    assert "Every move fits its window" in fits
    late = call("scenario", "check", path, *options, "2")
    assert late.code == 0
    assert "NOT every move fits its window: at worst the model waits for it, unless a step takes 3.07 ms" in late.out


def test_check_has_a_line_for_each_of_several(call: Call, write: Write) -> None:
    write("one")
    write("two")
    lines = call("scenario", "check", "scenarios").out.splitlines()
    told = "good, 18.5 KiB a rank, 12 KiB of host memory, moves fit steps of 8.38e-05 ms or longer"
    assert lines == [
        f"scenarios/one.yaml: {told}", f"scenarios/two.yaml: {told}",
        "times are those of moves at 55 GB/s (--bandwidth)",
    ]  # fmt: skip
    judged = call("scenario", "check", "scenarios", "--step-ms", "1e-6").out
    assert judged.count("moves do NOT fit steps of 1e-06 ms") == 2


def test_check_warns_when_shared_memory_does_not_suffice(
    call: Call, write: Write, shared_memory: Callable[[int], None]
) -> None:
    path, need = write(), 4 * mmap.PAGESIZE  # of 2 layers x 2 ranks, each 3072 bytes in whole pages
    shared_memory(need)
    assert "warning" not in call("scenario", "check", path).out
    shared_memory(need - 1)
    answer = call("scenario", "check", path)
    assert answer.code == 0
    assert f"warning: /dev/shm offers {need - 1:,} bytes now, {need:,} are needed on this node" in answer.out
    write("two")
    assert call("scenario", "check", "scenarios").out.count("warning: /dev/shm offers") == 2
    data = json.loads(call("scenario", "check", path, "--format", "json").out)["scenarios"][0]
    assert (data["shm_free_bytes"], data["shm_fits"]) == (need - 1, False)


def test_check_as_json(call: Call, write: Write) -> None:
    options = ["--format", "json", "--bandwidth", "10", "--step-ms", "20"]
    data = json.loads(call("scenario", "check", write(), *options).out)
    assert data["schema"] == 1
    assert data["assumed"] == {"bandwidth_gb_s": 10.0, "step_ms": 20.0}
    (one,) = data["scenarios"]
    assert (one["path"], one["name"], one["balancer_off"]) == ("scenarios/small.yaml", "small", None)
    assert one["memory"]["rank_bytes"] == 9216 + 512 + 9216
    assert one["move"]["move_ms"] == pytest.approx(4608 / 10e9 * 1e3)
    assert (one["move"]["window_ms"], one["move"]["fits"]) == (20.0, True)


def test_check_knows_the_sizes_of_a_checkpoint(call: Call) -> None:
    path = Path(__file__).parents[2] / "scenarios" / "models" / "mixtral_generates.yaml"
    (one,) = json.loads(call("scenario", "check", path, "--format", "json").out)["scenarios"]
    expert = 3 * 32 * 32 * 4
    assert one["memory"]["slots_bytes"] == 3 * 6 * expert
    assert one["memory"]["host_bytes"] == 3 * 8 * expert


@pytest.mark.parametrize("option", ["--bandwidth", "--step-ms"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "fast"])
def test_check_takes_only_numbers_above_0(option: str, value: str, call: Call, write: Write) -> None:
    answer = call("scenario", "check", write(), option, value)
    assert (answer.code, answer.out) == (2, "")
    assert option in answer.err


def test_check_tells_the_place(call: Call, write: Write) -> None:
    path = write("bad", SMALL.replace("top_k: 2", "topk: 2"))
    answer = call("scenario", "check", path)
    assert (answer.code, answer.out) == (2, "")
    assert f"{path}:4:" in answer.err
    assert "top_k" in answer.err


def test_show_is_complete_and_equal(call: Call, write: Write) -> None:
    path = write()
    out = call("scenario", "show", path, "--set", "seed=7").out
    assert "commit_delay: 1" in out
    assert scenarios.loads(out, "shown") == scenarios.load(path, ["seed=7"])


def test_show_needs_just_one_scenario(call: Call, write: Write) -> None:
    Path("scenarios").mkdir()
    answer = call("scenario", "show", "scenarios")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("error[E001]")
    write("one")
    assert call("scenario", "show", "scenarios").code == 0
    write("two")
    answer = call("scenario", "show", "scenarios")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("error[E008]: scenarios holds 2 scenarios")


def test_list_names_and_describes(call: Call, write: Write) -> None:
    write("one")
    write("two", SMALL.replace("layer_updates_per_iter: 1", "layer_updates_per_iter: 0"))
    out = call("scenario", "list").out
    assert [line.split() for line in out.splitlines()[2:]] == [
        ["one", "2", "4", "on", "a", "small", "one"],
        ["two", "2", "4", "off", "a", "small", "one"],
    ]
    data = json.loads(call("scenario", "list", "scenarios", "--format", "json").out)
    assert data[1] == {
        "name": "two", "ranks": 2, "iterations": 4, "balancer": "off", "description": "a small one",
        "path": "scenarios/two.yaml",
    }  # fmt: skip


def test_schema_is_json_schema(call: Call) -> None:
    schema = json.loads(call("scenario", "schema", "-o", "schema.json").out or Path("schema.json").read_text())
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert {"ranks", "model", "balancer", "checks"} <= schema["properties"].keys()
