"""``eplbctl doctor``: each lack is named with its cost and its fix."""

from __future__ import annotations

import builtins
import importlib
import json
from types import ModuleType, SimpleNamespace

import pytest

from eplbctl import diagnosis
from moe_eplb.balancer.host_memory import Segment

from .conftest import Answer, Call, Write

PARTS = ["python", "torch", "gloo", "nvtx", "cores", "memory", "/dev/shm", "stale segments"]


@pytest.fixture
def good_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough of everything, whatever the tests run on."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(diagnosis, "_available_memory", lambda: 1 << 40)
    monkeypatch.setattr("os.statvfs", lambda path: SimpleNamespace(f_bavail=1 << 20, f_frsize=4096, f_blocks=1 << 20))
    monkeypatch.setattr("moe_eplb.balancer.host_memory.list_segments", lambda: [])


def _states(answer: Answer) -> dict[str, str]:
    return {finding["part"]: finding["state"] for finding in json.loads(answer.out)}


@pytest.mark.usefixtures("good_machine")
def test_a_good_machine(call: Call) -> None:
    answer = call("doctor", "--format", "json")
    assert answer.code == 0
    assert _states(answer) == dict.fromkeys(PARTS, "ok")
    text = call("doctor").out
    assert "fix:" not in text
    assert all(f"\n{part} " in f"\n{text}" for part in PARTS)


@pytest.mark.usefixtures("good_machine")
@pytest.mark.parametrize(
    ("module", "missing"), [("torch", {"torch"}), ("torch.distributed", {"gloo"}), ("nvtx", {"nvtx"})], ids=str
)
def test_a_module_that_is_not_there(
    module: str, missing: set[str], call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = importlib.import_module

    def without(name: str, package: str | None = None) -> ModuleType:
        if name == module:
            raise ImportError(f"No module named {name!r}")
        return original(name, package)

    monkeypatch.setattr("importlib.import_module", without)
    answer = call("doctor", "--format", "json")
    assert answer.code == 1
    assert {part for part, state in _states(answer).items() if state == "missing"} == missing
    text = call("doctor").out
    assert f"No module named {module!r}" in text
    assert "fix: pip install" in text


@pytest.mark.usefixtures("good_machine")
@pytest.mark.parametrize(("version", "code"), [("2.10.1", 1), ("2.11.0+cpu", 0), ("3.0.0a1", 0), ("odd", 1)])
def test_an_old_torch(version: str, code: int, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.__version__", version)
    assert call("doctor").code == code


@pytest.mark.usefixtures("good_machine")
def test_torch_without_gloo(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_gloo_available", lambda: False)
    answer = call("doctor", "--format", "json")
    assert (answer.code, _states(answer)["gloo"]) == (1, "missing")


@pytest.mark.usefixtures("good_machine")
def test_without_the_library_that_reads_scenarios(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *arguments: object, **options: object) -> ModuleType:
        if name == "moe_eplb.core" and "scenario" in (arguments[2] or ()):  # type: ignore[operator]
            raise ImportError("No module named 'pydantic'")
        return original(name, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("builtins.__import__", without)
    answer = call("doctor")
    assert answer.code == 1
    assert "No module named 'pydantic'" in answer.out


@pytest.mark.usefixtures("good_machine")
def test_few_cores_and_little_memory_are_warnings(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    monkeypatch.setattr(diagnosis, "_available_memory", lambda: 1 << 20)
    answer = call("doctor", "--format", "json")
    assert answer.code == 0
    assert {part for part, state in _states(answer).items() if state == "warning"} == {"cores", "memory"}


@pytest.mark.usefixtures("good_machine")
def test_shared_memory_is_measured_against_the_scenario(
    call: Call, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write()  # 2 layers on 2 ranks: four segments of 2 experts x 3 x 16 x 8 float32, each a page of 4096 bytes
    for free, code in ((16384, 0), (16383, 1)):
        room = SimpleNamespace(f_bavail=free, f_frsize=1, f_blocks=16384)
        monkeypatch.setattr("os.statvfs", lambda _, room=room: room)
        answer = call("doctor", path)
        assert answer.code == code
        assert "16 KiB needed by small" in answer.out


@pytest.mark.usefixtures("good_machine")
def test_stale_segments_are_a_warning(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    segments = [Segment("moe_eplb-a-1-1-x", 4096, 1, False, 0.0), Segment("moe_eplb-b-2-1-x", 4096, 2, True, 0.0)]
    monkeypatch.setattr("moe_eplb.balancer.host_memory.list_segments", lambda: segments)
    answer = call("doctor")
    assert answer.code == 0
    assert "1, 4 KiB" in answer.out
    assert "fix: eplbctl shm clean" in answer.out


def test_this_machines_memory_is_read() -> None:
    assert diagnosis._available_memory() > 1 << 20


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1 << 20, "1 MiB"), (3 << 29, "1.5 GiB"), (1 << 50, "1048576.0 GiB")],
)
def test_sizes_are_read_by_people(count: int, text: str) -> None:
    assert diagnosis._size(count) == text
