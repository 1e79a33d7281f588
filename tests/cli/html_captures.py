"""Captures and reports for the tests of pictures: small ones made by hand, large ones, hostile ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import ROLE_CODE, Capture
from moe_eplb.analysis.trace_report import TraceReport, make_trace_report
from moe_eplb.core.events import Role
from moe_eplb.core.verdict import CheckResult, Status
from tests.analysis.captures import MakeCapture

__all__ = ["CHECKS", "HOSTILE", "hostile", "large", "report_on", "small"]

HOSTILE = {
    "script": "<script>alert(1)</script><img src=x onerror=alert(2)>",
    "end of script": "</script><script>alert(3)</script>",
    "quotes": "\"'`onmouseover=alert(4) {{ 7 * 7 }} ${alert(5)}",
    "direction": "abc\u202edef\u2066ghi",
    "control": "nul\x00bell\x07escape\x1b[31m",
    "long": "x" * 10_000,
    "comment": "<!--<script>",
    "lines": "one\u2028two\u2029three",
    "half": "half \ud800 character",
}

CHECKS = (
    CheckResult("call_order", Status.INVALID, "E104", "a legal order", "  route layer 0\n> this call", "iteration 1"),
    CheckResult("joins", Status.VALID, "4 joins", "4 joins"),
    CheckResult("complete", Status.UNKNOWN, "cut", "a whole trace"),
)


def small() -> Capture:
    """Two ranks, three iterations of 100 us: compute on stream 7, balancer on 9, a third of its work exposed."""
    make = MakeCapture()
    for rank in (0, 1):
        make.stream(7, "Main", rank)
        make.stream(9, "MoeBalancer", rank)
        for iteration in range(3):
            at, more = iteration * 100_000 + rank * 1000, {"rank": rank, "iteration": iteration}
            make.range("step", at, at + 95_000, thread=5, rank=rank)
            make.range("attention", at + 1000, at + 40_000, thread=5, rank=rank)
            make.gpu(Role.COMPUTE, at, at + 60_000, 7, "gemm", layer=0, **more)
            make.gpu(Role.COMM, at + 70_000, at + 90_000, 7, "dispatch", layer=1, **more)
            make.gpu(Role.EPLB_STATISTIC, at + 20_000, at + 40_000, 9, "histogram", layer=0, **more)
            make.gpu(Role.EPLB_SIGNAL, at + 60_000, at + 70_000, 9, "hand_over", layer=1, **more)
    return make.done()


def large(events: int = 100_000) -> Capture:
    """So many events on four streams of one rank, of all roles in turn, 1 us apart."""
    number = np.arange(events)
    gpu = c.filled(
        c.GPU, events, start=number * 1000, end=number * 1000 + 600 + number % 7 * 50, stream=number % 4,
        name=number % 20, rank=0, device=0, process=0, role=number % 11, iteration=number // 2000, layer=number % 8,
        kind=c.KERNEL,
    )  # fmt: skip
    return Capture("a large one", "test", tuple(f"kernel {n}" for n in range(20)), gpu).in_order()


def hostile() -> Capture:
    """Every text that a trace can hold is one that would like to be more than text."""
    make = MakeCapture()
    for number, text in enumerate(HOSTILE.values()):
        make.stream(number, text)
        make.range(text, number * 1000, number * 1000 + 900, domain=text)
        make.launched(
            Role.EPLB_STATISTIC, number * 1000 + 10, number * 1000 + 100, number * 1000 + 800, number, name=text
        )
    made = make.done()
    made.gpu["iteration"] = 0
    made.gpu["role"][::2] = ROLE_CODE[Role.UNKNOWN]
    return made


def report_on(capture: Capture, checks: Sequence[CheckResult] = CHECKS) -> TraceReport:
    """The report of a capture."""
    return make_trace_report(capture, checks=checks)
