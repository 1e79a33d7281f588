"""``eplbctl report``: what a run or any trace spent its time on, what was hidden, and whether calls were legal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from eplbctl.options import PATH, Destination, format_option, output_options, trace_options
from moe_eplb.core.errors import ExitCode, TraceError

if TYPE_CHECKING:
    from moe_eplb.analysis.report import Question, Report

__all__ = ["command"]

_FORMS = ("text", "json", "markdown", "junit", "github", "html", "svg", "png", "perfetto")


@click.command()
@click.argument("traces", nargs=-1, required=True, type=PATH, metavar="TRACE...")
@trace_options
@click.option("--fail-if", "conditions", multiple=True, metavar="CONDITION", help="End with 1 if it holds. Repeatable.")
@click.option("--strict", is_flag=True, help="End with 3 if an order check is unknown, too.")
@click.option("--top", type=click.IntRange(0, 1000), default=10, show_default=True, help="Exposed stretches to list.")
@format_option(*_FORMS)
@output_options
def command(
    traces: tuple[Path, ...], question: Question, conditions: tuple[str, ...], strict: bool, top: int, form: str,
    destination: Destination,
) -> ExitCode:  # fmt: skip
    """Report on a trace: order of calls, overlap, exposed stretches, idle time, critical path, stragglers.

    TRACE is a run folder, an export (.sqlite) or a report (.nsys-rep) of Nsight Systems, or Chrome JSON of the PyTorch
    profiler; SQLite and JSON may be packed with gzip, SQLite with xz. Several are those of the ranks of one job. It
    needs neither the machine of the run nor torch.

    The exit code is 1 if an order check is invalid or a condition of --fail-if holds, 3 if such a condition cannot be
    judged. A condition is METRIC [p50|p95|p99|min|max|mean] OP NUMBER.

    \b
    Examples:
      eplbctl report runs/quickstart-20260102T030405Z
      eplbctl report rank0.json.gz rank1.json.gz --fail-if 'exposed.p95_us > 50' --format junit -o report.xml
      eplbctl report trace.sqlite --iterations 5-20 --rank 0 --format html -o report.html
    """
    from dataclasses import replace

    from moe_eplb.analysis.report import make_report
    from moe_eplb.analysis.report_metrics import parse_limits

    asked = replace(question, limits=parse_limits(conditions), most_exposed=top)
    report = make_report(traces, asked)
    _write(report, traces, form, asked, destination)
    if report.invalid:
        return ExitCode.INVALID
    unknown = any(check.status.value == "unknown" for check in report.checks)
    return ExitCode.UNKNOWN if report.undecided or (strict and unknown) else ExitCode.VALID


def _write(report: Report, traces: tuple[Path, ...], form: str, question: Question, destination: Destination) -> None:
    from eplbctl.render import report as render

    if form in ("text", "json", "markdown"):
        forms = {"text": render.text, "json": render.json_text, "markdown": render.markdown}
        destination.write(forms[form](report))
    elif form in ("junit", "github"):
        destination.write(_for_ci(report, traces[0], form))
    else:
        _draw(report, form, question, destination)


def _for_ci(report: Report, path: Path, form: str) -> str:
    from eplbctl.outcome import Outcome
    from eplbctl.render import machine
    from moe_eplb.core.verdict import Verdict

    verdict = Verdict(report.name, report.checks, report.measures.single)
    outcome = Outcome(report.name, path, verdict, 0.0, verdict.exit_code)
    if form == "junit":
        return machine.junit([outcome], by="eplbctl report")
    return machine.github([outcome], by="eplbctl report", noun="reports")


def _draw(report: Report, form: str, question: Question, destination: Destination) -> None:
    if report.trace is None or report.capture is None:
        raise TraceError("E058", "there is nothing to draw: the run left no trace")
    if form == "html":
        from eplbctl.render import html

        destination.write(html.page(report.trace, report.capture, report.name, question.selection))
    elif form == "perfetto":
        from eplbctl.render import perfetto

        destination.write(perfetto.text(report.trace, report.capture))
    else:
        from eplbctl.render import image

        if form == "png":
            destination.write_bytes(image.png(report.trace, report.capture, question.selection))
        else:
            destination.write(image.svg(report.trace, report.capture, question.selection))
