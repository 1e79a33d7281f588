"""What GPU time is: by range, by stream, by name, in this order, and never a guess."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import ROLES, Capture
from moe_eplb.analysis.overlap import PAIRS, measure
from moe_eplb.analysis.role_table import load_role_table
from moe_eplb.analysis.roles import classify, prepare, role_times, unknown_names
from moe_eplb.analysis.work import work_of_capture
from moe_eplb.core.errors import TraceError
from moe_eplb.core.events import Role
from tests.analysis.captures import MakeCapture


def _roles(capture: Capture) -> list[str]:
    return [ROLES[code].value for code in classify(capture)]


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "comm"),
        ("ncclKernel_SendRecv(ncclDevComm*, unsigned long, ncclWork*)", "comm"),
        ("void deep_ep::intranode::dispatch<8, 512>(int4*)", "comm"),
        ("void deep_ep::internode_ll::combine<true, 7168, 8>(void*)", "comm"),
        ("void deep_ep::intranode::notify_dispatch<8>(int const*)", "comm_wait"),
        ("void deep_ep::internode::cached_notify<true>(int)", "comm_wait"),
        ("void deep_ep::intranode::barrier<8>(int**, int)", "comm_wait"),
        ("void deep_ep::layout::get_dispatch_layout<256, 32, 8>(long const*)", "other"),
        ("nvshmemi_barrier_on_stream_kernel(int)", "comm_wait"),
        ("void nvshmemi_put_kernel(void*)", "comm"),
        ("void c10d::symmetric_memory::(anonymous namespace)::barrier_kernel(unsigned int**)", "comm_wait"),
        ("void one_shot_all_reduce_kernel<c10::BFloat16, 16, 8>(c10::BFloat16**)", "comm"),
        ("void pplx::dispatchSendKernel<true>(int)", "comm"),
        ("a2a_combine_recv_kernel", "comm"),
        ("void tensorrt_llm::kernels::moeWaitSignalForGpuStageKernel(int)", "eplb_wait"),
        ("tensorrt_llm::kernels::moeSetSignalForCpuStageKernel(int)", "eplb_signal"),
        ("void tensorrt_llm::kernels::statisticKernel<int>(int)", "eplb_statistic"),
        ("void tensorrt_llm::kernels::moeComputeRouteNoRedundantKernel<1024>(int)", "compute"),
        ("_histogram", "eplb_statistic"),
        ("_hand_over", "eplb_signal"),
        ("_vote_all", "eplb_wait"),
        ("_settle_and_fold_all", "eplb_statistic"),
        ("_vote_and_fold", "eplb_statistic"),
        ("_send_rows", "compute"),
        ("void c10d::nvshmem_extension::allToAllV(void*, void*, long*, unsigned long)", "comm"),
        ("void alltoall_on_stream_kernel<char>(int, char*, char const*, unsigned long)", "comm"),
        ("_swiglu", "compute"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "compute"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "compute"),
        ("triton_poi_fused_add_mul_0", "compute"),
        ("Memcpy PtoP", "comm"),
        ("Memcpy HtoD (Pinned -> Device)", "memcpy"),
        ("Memset (Device)", "memcpy"),
        ("my_broadcast_kernel", "unknown"),
        ("spin_kernel", "unknown"),
        ("", "unknown"),
    ],
)
def test_names(name: str, role: str) -> None:
    made = MakeCapture()
    made.gpu(None, 0, 1, name=name)
    assert _roles(made.done()) == [role]


def test_a_range_of_ours_says_more_than_a_name() -> None:
    made = MakeCapture()
    made.range("commit/3", 0, 10, "moe_eplb")
    made.range("dispatch/3", 20, 30, "moe_eplb")
    made.range("step", 0, 99, "moe_eplb")
    made.range("check", 40, 50, "moe_eplb")
    made.launched(None, 5, 100, 101, name="Memcpy HtoD")
    made.launched(None, 25, 110, 111, name="void at::native::index_kernel")
    made.launched(None, 26, 120, 121, name="void deep_ep::intranode::notify_dispatch<8>")
    made.launched(None, 45, 130, 131, name="sm90_xmma_gemm")
    assert _roles(made.done()) == ["eplb_migrate", "comm", "comm_wait", "compute"]


def test_what_our_checks_launch_behind_an_iteration_is_no_part_of_it() -> None:
    made = MakeCapture()
    made.range("step", 0, 50, "moe_eplb", payload=3)
    made.range("commit/1", 10, 20, "moe_eplb", payload=3)
    made.range("check", 50, 90, "moe_eplb", payload=3)
    made.range("check", 90, 99, "of_a_user", payload=3)
    for launch in (5, 15, 60, 95):
        made.launched(None, launch, 100 + launch, 101 + launch, name="Memcpy DtoH")
    assert prepare(made.done()).gpu["iteration"].tolist() == [3, 3, c.UNKNOWN, c.UNKNOWN]


def test_the_balancers_stream_gives_its_work_away() -> None:
    made = MakeCapture()
    made.stream(20, "MoeBalancer")
    for number, name in enumerate(
        ("ncclDevKernel_AllReduce", "Memcpy HtoD", "spin", "moeWaitSignalForGpuStage", "_fold")
    ):
        made.gpu(None, number * 10, number * 10 + 5, 20, name)
    made.gpu(None, 60, 65, 7, "Memcpy HtoD")
    assert _roles(made.done()) == [
        "eplb_allreduce", "eplb_migrate", "eplb_statistic", "eplb_wait", "eplb_statistic", "memcpy",
    ]  # fmt: skip


def test_a_librarys_range_does_not_say_what_a_collective_of_ours_is_for() -> None:
    made = MakeCapture()
    for number, ours in enumerate(("statistic_reduce/0", "dispatch/0", "experts/0")):
        at = 100 * number
        made.range(ours, at, at + 50, domain="moe_eplb")
        made.range("AllReduce", at + 10, at + 30, domain="NCCL")
        made.launched(None, at + 15, at + 60, at + 90, name="ncclDevKernel_AllReduce")
    made.range("route/0", 400, 450, domain="moe_eplb")
    made.range("AllReduce", 410, 430, domain="NCCL")
    made.launched(None, 415, 460, 490, name="ncclDevKernel_AllReduce")
    made.range("AllGather", 300, 330, domain="NCCL")
    made.launched(None, 310, 350, 360, name="ncclDevKernel_AllGather")
    assert _roles(made.done()) == ["eplb_allreduce", "comm", "compute", "comm", "eplb_allreduce"]


def test_our_range_tells_only_of_what_its_own_thread_launches() -> None:
    made = MakeCapture()
    made.range("stage_weights/3", 0, 90, "moe_eplb", thread=2, payload=5)
    made.range("send", 0, 90, "NVSHMEM", thread=3)
    made.launched(None, 10, 100, 110, name="flash_attention_kernel", thread=1)
    made.launched(None, 20, 110, 120, name="Memcpy DtoD", thread=2)
    capture = prepare(made.done())
    assert [ROLES[code].value for code in capture.gpu["role"]] == ["comm", "eplb_migrate"]
    assert capture.gpu["layer"].tolist() == [c.UNKNOWN, 3]
    assert capture.gpu["iteration"].tolist() == [5, 5]


def test_unknown_time_is_listed_and_is_no_compute() -> None:
    made = MakeCapture()
    made.gpu(None, 0, 100, 20, "ncclDevKernel_AllReduce")
    made.gpu(None, 0, 60, 7, "mystery")
    made.gpu(None, 60, 70, 7, "sm90_xmma_gemm")
    capture = prepare(made.done())
    (unknown,) = unknown_names(capture, capture.gpu["role"])
    assert (unknown.name, unknown.total_ns, unknown.events) == ("mystery", 60, 1)
    assert measure(work_of_capture(capture), PAIRS["communication"]).whole.hidden == 10
    assert [time.name for time in role_times(capture, capture.gpu["role"])][:2] == [
        "ncclDevKernel_AllReduce",
        "mystery",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("route/0", ["compute", "eplb_wait", "eplb_statistic", "compute"]),
        ("experts/0", ["compute"] * 4),
    ],
)
def test_names_tell_within_our_route_alone(text: str, expected: list[str]) -> None:
    made = MakeCapture()
    made.range(text, 0, 50, "moe_eplb")
    for number, name in enumerate(("_route", "_vote", "_settle_and_fold", "sm90_xmma_gemm")):
        made.launched(None, 10 + number, 100 + 10 * number, 105 + 10 * number, name=name)
    capture = prepare(made.done())
    assert [ROLES[code].value for code in capture.gpu["role"]] == expected


def test_a_table_of_the_users_is_asked_first(tmp_path: Path) -> None:
    table = tmp_path / "roles.yaml"
    table.write_text(
        "kernels:\n- {role: comm_wait, name: '^mystery'}\n- {role: other, name: gemm}\n"
        "domains:\n- {domain: '^mine$', text: send, role: comm}\n"
        "iterations: ['^pass (\\d+)$']\nlayers: ['block(\\d+)']\n"
        "streams:\n- {name: side, roles: {compute: comm}}\n"
    )
    made = MakeCapture()
    made.stream(9, "side stream")
    made.range("pass 41", 0, 90)
    made.range("block7.attn", 0, 50, thread=2)
    made.range("send it", 0, 50, "mine")
    made.launched(None, 10, 100, 110, name="anything")
    made.launched(None, 60, 120, 130, name="mystery 1")
    made.launched(None, 61, 131, 132, name="sm90_xmma_gemm")
    made.launched(None, 62, 140, 150, stream=9, name="flash_fwd")
    capture = prepare(made.done(), tables=[table])
    assert [ROLES[code].value for code in capture.gpu["role"]] == ["comm", "comm_wait", "other", "comm"]
    assert capture.gpu["iteration"].tolist() == [41] * 4
    assert capture.gpu["layer"].tolist() == [7, -1, -1, -1]


def test_iterations_without_a_number_are_counted() -> None:
    made = MakeCapture()
    for step in range(3):
        made.range("step", step * 100, step * 100 + 50)
        made.launched(None, step * 100 + 10, step * 100 + 20, step * 100 + 30)
    assert prepare(made.done()).gpu["iteration"].tolist() == [0, 1, 2]


def test_our_ranges_say_their_iteration_and_layer() -> None:
    made = MakeCapture()
    made.range("experts/12", 0, 50, "moe_eplb", payload=7)
    made.launched(None, 10, 20, 30)
    capture = prepare(made.done())
    assert (capture.gpu["iteration"].tolist(), capture.gpu["layer"].tolist()) == ([7], [12])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kernels: 5", "must be a list"),
        ("colours: []", "no such key"),
        ("kernels: [{role: compute, name: '('}]", "no regular expression"),
        ("kernels: [{role: dancing, name: a}]", "no such role"),
        ("kernels: [{role: compute}]", "must be a pattern"),
        ("kernels: [{role: compute, name: a, stream: b}]", "no such key"),
        ("streams: [{name: a, roles: {work: comm}}]", "no such key"),
        ("layers: ['layer']", "needs a group"),
        ("domains: [{text: a, role: comm}]", "must be a pattern"),
        ("- a", "must be a mapping"),
        ("kernels: [", "cannot be read"),
    ],
)
def test_a_table_that_is_not_acceptable(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "roles.yaml"
    path.write_text(text)
    with pytest.raises(TraceError, match=said) as caught:
        load_role_table([path])
    assert caught.value.code == "E067"
    assert str(path) in caught.value.where


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="E067"):
        load_role_table([tmp_path / "none.yaml"])


def test_roles_that_the_source_states_stay() -> None:
    made = MakeCapture()
    made.gpu(Role.EPLB_SIGNAL, 0, 1, name="sm90_xmma_gemm")
    assert _roles(made.done()) == ["eplb_signal"]
