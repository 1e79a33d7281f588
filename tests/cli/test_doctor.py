"""``eplbctl doctor``: each lack is named with its cost and its fix."""

from __future__ import annotations

import builtins
import importlib
import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from eplbctl import diagnosis, probes_gpu
from eplbctl.finding import Finding, size
from eplbctl.probes_gpu import Gpu, Probes, SeenByDriver
from moe_eplb.balancer.host_memory import Segment
from moe_eplb.recording.nsys_tool import LIBRARIES_FIX, Nsys

from .conftest import Answer, Call, Write

PARTS = ["python", "torch", "gloo", "nvtx", "cores", "memory", "/dev/shm", "stale segments", "GPU"]


H200 = Gpu("NVIDIA H200", 140 << 30, (9, 0))
SEEN = SeenByDriver("NVIDIA H200", "580.95.05", "Default")
GPU_PARTS = [
    "GPU", "driver", "compute mode", "NCCL", "NVSHMEM", "CUDA_DEVICE_MAX_CONNECTIONS", "locked memory", "triton",
    "cuda-bindings", "nsys", "libcupti",
]  # fmt: skip


@dataclass
class FakeProbes(Probes):
    """A machine: without GPUs unless they are given, and then with all that goes with them."""

    here: list[Gpu] = field(default_factory=list)
    driver: list[SeenByDriver] = field(default_factory=list)
    cuda: str = "13.0"
    apart: list[tuple[int, int]] = field(default_factory=list)
    link: str = "NV18"
    nccl_version: str = "2.28.9"
    has_nvshmem: bool = True
    tools: list[Nsys] = field(default_factory=lambda: [Nsys(Path("/opt/nsys"), "2025.3.1")])
    copies: list[tuple[str, str]] = field(default_factory=lambda: [("package nvidia-cuda-cupti", "13.0.85")])
    variables: dict[str, str] = field(default_factory=dict)
    lockable: int | None = None
    broken: str = ""

    def gpus(self) -> list[Gpu]:
        return self.here

    def seen_by_driver(self) -> list[SeenByDriver]:
        return self.driver

    def torch_cuda(self) -> str:
        return self.cuda

    def peer_access(self, count: int) -> list[tuple[int, int]]:
        return self.apart

    def links(self) -> dict[tuple[int, int], str]:
        pairs = [(a, b) for a in range(len(self.here)) for b in range(len(self.here)) if a != b]
        return dict.fromkeys(pairs, self.link) if self.link else {}

    def nccl(self) -> str:
        return self.nccl_version

    def nvshmem(self) -> bool:
        return self.has_nvshmem

    def nsys(self) -> list[Nsys]:
        return self.tools

    def cupti(self) -> list[tuple[str, str]]:
        return self.copies

    def variable(self, name: str) -> str:
        return self.variables.get(name, "")

    def lockable_bytes(self) -> int | None:
        return self.lockable

    def import_error(self, name: str) -> str:
        return f"No module named {name!r}" if name == self.broken else ""


def _put(monkeypatch: pytest.MonkeyPatch, probes: Probes) -> None:
    monkeypatch.setattr(diagnosis, "Probes", lambda: probes)


def _with_gpus(count: int = 1, **changes: Any) -> FakeProbes:
    return FakeProbes(here=[H200] * count, driver=[SEEN] * count, **changes)


@pytest.fixture
def good_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough of everything, whatever the tests run on."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(diagnosis, "_available_memory", lambda: 1 << 40)
    monkeypatch.setattr("os.statvfs", lambda path: SimpleNamespace(f_bavail=1 << 20, f_frsize=4096, f_blocks=1 << 20))
    monkeypatch.setattr("moe_eplb.balancer.host_memory.list_segments", lambda: [])
    _put(monkeypatch, FakeProbes())


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
    assert size(count) == text


# -- GPUs ------------------------------------------------------------------------------------------------------------


def _gpu_findings(call: Call, monkeypatch: pytest.MonkeyPatch, probes: Probes, *arguments: object) -> list[Finding]:
    _put(monkeypatch, probes)
    found = json.loads(call("doctor", *arguments, "--format", "json").out)
    return [Finding(**finding) for finding in found[len(PARTS) - 1 :]]


def _one(findings: list[Finding], part: str) -> Finding:
    return next(finding for finding in findings if finding.part == part)


CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
MIXING = "NCCL_GRAPH_MIXING_SUPPORT"
CUDA = """\
ranks: 2
iterations: 4
device: cuda
model: {layers: 2, experts: 4, top_k: 2, hidden: 16, intermediate: 8}
"""


@pytest.mark.usefixtures("good_machine")
def test_no_gpu_is_one_line_and_a_warning_only_where_one_is_asked_for(
    call: Call, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _gpu_findings(call, monkeypatch, FakeProbes()) == [Finding("GPU", "ok", "none")]
    (finding,) = _gpu_findings(call, monkeypatch, FakeProbes(), write("cuda", CUDA))
    assert (finding.part, finding.state, finding.found) == ("GPU", "warning", "none")
    assert finding.cost
    assert finding.fix


@pytest.mark.usefixtures("good_machine")
@pytest.mark.parametrize("count", [1, 2])
def test_a_good_machine_with_gpus(count: int, call: Call, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    _put(monkeypatch, _with_gpus(count))
    assert call("doctor").code == 0
    assert "fix:" not in call("doctor").out
    findings = _gpu_findings(call, monkeypatch, _with_gpus(count))
    expected = GPU_PARTS[:3] + ["GPU links"] * (count > 1) + GPU_PARTS[3:6] + [MIXING] * (count > 1) + GPU_PARTS[6:]
    assert [(finding.part, finding.state) for finding in findings] == [(part, "ok") for part in expected]
    assert _one(findings, "GPU").found == f"{count} x NVIDIA H200, 140.0 GiB, 9.0"
    assert _one(findings, "driver").found == "580.95.05, torch for CUDA 13.0"
    assert _one(findings, "nsys").found == "2025.3.1, /opt/nsys"
    if count > 1:
        assert _one(findings, "GPU links").found == "NVLink (NV18)"


def test_the_readme_names_every_part() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    section = readme.partition("### What doctor looks at")[2].partition("###")[0].replace("`", "")
    assert [part for part in [*PARTS, *GPU_PARTS, "GPU links", MIXING] if part not in section] == []


OLD = SeenByDriver("NVIDIA H200", "535.161.08", "Default")
NO_LIBRARY = Nsys(Path("/opt/nsys"), problem="the library libdw.so.1 is missing", fix=LIBRARIES_FIX)


@pytest.mark.usefixtures("good_machine")
@pytest.mark.parametrize(
    ("probes", "part", "found", "cost", "fix"),
    [
        (FakeProbes(driver=[OLD]), "GPU", "1 x NVIDIA H200, none of them", "nothing runs", "CUDA_VISIBLE_DEVICES"),
        (FakeProbes(driver=[OLD]), "driver", "535.161.08", "needs driver 580", "update the driver"),
        (FakeProbes(driver=[SEEN], cuda=""), "driver", "580.95.05", "built without CUDA", "torch wheel"),
        (_with_gpus(2, link="SYS"), "GPU links", "SYS", "PCIe", "topo -m"),
        (_with_gpus(2, link=""), "GPU links", "not told", "PCIe", "topo -m"),
        (_with_gpus(2, apart=[(0, 1), (1, 0)]), "GPU links", "between 0 and 1; NV18", "host memory", "peer"),
        (_with_gpus(nccl_version=""), "NCCL", "without it", "one GPU", "torch wheel"),
        (_with_gpus(has_nvshmem=False), "NVSHMEM", "none", "symm_mem is refused", "nvidia-nvshmem"),
        (_with_gpus(variables={CONNECTIONS: "1"}), CONNECTIONS, "1", "blocks another", "unset"),
        (_with_gpus(variables={CONNECTIONS: "x"}), CONNECTIONS, "x", "no number", "unset"),
        (_with_gpus(2, variables={MIXING: "1"}), MIXING, "1", "begin late", "unset"),
        (_with_gpus(lockable=8 << 20), "locked memory", "at most 8 MiB", "pinned", "ulimit -l"),
        (_with_gpus(broken="triton"), "triton", "No module named 'triton'", "nothing runs on a GPU", "pip install"),
        (_with_gpus(broken="cuda.bindings.driver"), "cuda-bindings", "No module", "hand over", "pip install"),
        (_with_gpus(tools=[]), "nsys", "not found", "is refused", "install Nsight Systems"),
        (_with_gpus(tools=[NO_LIBRARY]), "nsys", "/opt/nsys: the library libdw.so.1", "is refused", "LD_LIBRARY_PATH"),
        (_with_gpus(copies=[("/usr/local/cuda-13.0", "13.0.48")]), "libcupti", "13.0.48", "crashes", "13.0.85"),
        (FakeProbes(here=[H200]), "driver", "nvidia-smi does not answer", "cannot be told", "PATH"),
        (FakeProbes(here=[Gpu("NVIDIA A100", 80 << 30, (8, 0))], driver=[SEEN]), "GPU", "8.0", "9.0", "newer"),
        (
            FakeProbes(here=[H200], driver=[SeenByDriver("NVIDIA H200", "580.95.05", "Exclusive_Process")]),
            "compute mode", "Exclusive_Process", "one process a GPU", "nvidia-smi -c DEFAULT",
        ),
    ],
)  # fmt: skip
def test_each_lack_is_a_warning_with_its_cost_and_its_fix(
    probes: FakeProbes, part: str, found: str, cost: str, fix: str, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = _one(_gpu_findings(call, monkeypatch, probes), part)
    assert finding.state == "warning"
    assert found in finding.found
    assert cost in finding.cost
    assert fix in finding.fix
    answer = call("doctor")
    assert answer.code == 0
    assert f"\n  fix: {finding.fix}" in answer.out


@pytest.mark.usefixtures("good_machine")
@pytest.mark.parametrize(
    ("probes", "part", "cost"),
    [
        (_with_gpus(1), "GPU", "each of the 2 ranks"),
        (_with_gpus(2, nccl_version=""), "NCCL", "cannot talk"),
        (_with_gpus(2, broken="triton"), "triton", "nothing runs on a GPU"),
        (
            FakeProbes(here=[H200] * 2, driver=[SeenByDriver("NVIDIA H200", "580.95.05", "Prohibited")]),
            "compute mode", "no process",
        ),
    ],
)  # fmt: skip
def test_what_a_scenario_for_gpus_cannot_do_without_is_missing(
    probes: FakeProbes, part: str, cost: str, call: Call, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = _gpu_findings(call, monkeypatch, probes, write("cuda", CUDA))
    assert [(finding.part, finding.state) for finding in findings if finding.state != "ok"] == [(part, "missing")]
    assert cost in _one(findings, part).cost
    assert call("doctor", "scenarios/cuda.yaml").code == 1


@pytest.mark.usefixtures("good_machine")
def test_a_libcupti_that_crashes_and_is_about_to_be_injected_is_missing_a_good_one(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = "/usr/local/cuda-13.0"
    variables = {"NVTX_INJECTION64_PATH": f"{place}/extras/CUPTI/lib64/libcupti.so.13"}
    copies = [("package nvidia-cuda-cupti", "13.0.85"), (place, "13.0.48")]
    finding = _one(_gpu_findings(call, monkeypatch, _with_gpus(copies=copies, variables=variables)), "libcupti")
    assert (finding.state, finding.fix) == ("missing", "unset it")


@pytest.mark.usefixtures("good_machine")
@pytest.mark.parametrize(("value", "state"), [("", "ok"), ("32", "ok"), ("7", "ok"), ("6", "warning")])
def test_every_stream_needs_a_hardware_queue(
    value: str, state: str, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes = _with_gpus(variables={CONNECTIONS: value})
    assert _one(_gpu_findings(call, monkeypatch, probes), CONNECTIONS).state == state


@pytest.mark.usefixtures("good_machine")
@pytest.mark.parametrize(("value", "found"), [("", "not set"), ("0", "0")])
def test_graphs_without_nodes_of_nccl_are_fine(
    value: str, found: str, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = _one(_gpu_findings(call, monkeypatch, _with_gpus(2, variables={MIXING: value})), MIXING)
    assert finding.state == "ok"
    assert found in finding.found


# -- the probes themselves -------------------------------------------------------------------------------------------

TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m
GPU0\t X \tNV18\tSYS\tPIX\t0-15\t0
GPU1\tNV18\t X \tNODE\tSYS\t0-15\t0
GPU2\tSYS\tNODE\t X \tSYS\t0-15\t0
NIC0\tPIX\tSYS\tSYS\t X \t\t

Legend:

  X    = Self
  NV#  = Connection traversing a bonded set of # NVLinks
"""


def _smi(monkeypatch: pytest.MonkeyPatch, text: str, code: int = 0) -> None:
    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[0] == "nvidia-smi"
        assert options["timeout"] > 0
        return subprocess.CompletedProcess(command, code, stdout=text, stderr="")

    monkeypatch.setattr(subprocess, "run", run)


def test_links_are_read_from_the_topology(monkeypatch: pytest.MonkeyPatch) -> None:
    _smi(monkeypatch, TOPOLOGY)
    assert Probes().links() == {
        (0, 1): "NV18", (0, 2): "SYS", (1, 0): "NV18", (1, 2): "NODE", (2, 0): "SYS", (2, 1): "NODE",
    }  # fmt: skip


def test_gpus_are_read_from_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    _smi(monkeypatch, "NVIDIA H200, 580.95.05, Default\nNVIDIA H200, 580.95.05, Exclusive_Process\n")
    assert [gpu.compute_mode for gpu in Probes().seen_by_driver()] == ["Default", "Exclusive_Process"]
    assert Probes().seen_by_driver()[0] == SEEN
    _smi(monkeypatch, "NVIDIA-SMI has failed because it could not communicate with the driver", code=9)
    assert Probes().seen_by_driver() == []
    assert Probes().links() == {}


def test_a_driver_tool_that_is_not_there_or_hangs_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (FileNotFoundError(2, "No such file"), subprocess.TimeoutExpired("nvidia-smi", 30.0)):

        def run(*arguments: Any, error: Exception = error, **options: Any) -> None:
            raise error

        monkeypatch.setattr(subprocess, "run", run)
        assert Probes().seen_by_driver() == []


def test_copies_of_libcupti_are_found_in_packages_and_toolkits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes_gpu, "_TOOLKITS", tmp_path)
    monkeypatch.setattr(probes_gpu, "_CUPTI_PACKAGES", ("click", "nvidia-cuda-cupti-of-nobody"))
    (tmp_path / "cuda-13.0").mkdir()
    (tmp_path / "cuda-13.0" / "version.json").write_text('{"cuda_cupti": {"name": "CUPTI", "version": "13.0.48"}}')
    (tmp_path / "cuda").symlink_to(tmp_path / "cuda-13.0")
    (tmp_path / "cuda-12.0").mkdir()
    (tmp_path / "cuda-12.0" / "version.json").write_text("{}")
    found = Probes().cupti()
    assert [place for place, _ in found] == ["package click", str(tmp_path / "cuda-13.0")]
    assert found[1][1] == "13.0.48"


def test_this_machine_answers_every_probe() -> None:
    probes = Probes()
    gpus = probes.gpus()
    assert all(gpu.memory > 0 for gpu in gpus)
    assert probes.peer_access(1) == []
    assert isinstance(probes.nccl(), str)
    assert isinstance(probes.nvshmem(), bool)
    assert probes.import_error("json") == ""
    assert "of_nobody" in probes.import_error("a_module_of_nobody")
    limit = probes.lockable_bytes()
    assert limit is None or limit >= 0
