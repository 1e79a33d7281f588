"""Outcomes for other programs: JSON, JUnit XML and GitHub annotations."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from xml.etree import ElementTree

from eplbctl.outcome import Outcome, worst_exit_code
from moe_eplb.core.verdict import CheckResult, Status

__all__ = ["github", "json_text", "junit"]

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_JUNIT_TAG = {Status.INVALID: "failure", Status.UNKNOWN: "error"}
_GITHUB_LEVEL = {Status.INVALID: "error", Status.UNKNOWN: "warning"}


def json_text(outcomes: Sequence[Outcome], *, not_run: int) -> str:
    """One object with every outcome and its whole verdict."""
    results = [
        {
            "name": outcome.name,
            "path": str(outcome.path),
            "folder": str(outcome.folder) if outcome.folder is not None else None,
            "seconds": round(outcome.seconds, 3),
            "exit_code": int(outcome.exit_code),
            "verdict": outcome.verdict.to_json(),
        }
        for outcome in outcomes
    ]
    code = worst_exit_code(outcome.exit_code for outcome in outcomes)
    return json.dumps({"schema": 1, "exit_code": int(code), "not_run": not_run, "results": results}, indent=2)


def junit(outcomes: Sequence[Outcome], by: str = "eplbctl verify") -> str:
    """A test suite a scenario and a test case a check. Unknown is an error, because it is no success."""
    root = ElementTree.Element("testsuites", name=by)
    for outcome in outcomes:
        suite = ElementTree.SubElement(root, "testsuite", name=outcome.name, time=f"{outcome.seconds:.3f}")
        for check in outcome.verdict.checks:
            _case(suite, outcome, check)
        if outcome.verdict.failure:
            case = ElementTree.SubElement(suite, "testcase", classname=outcome.name, name="run")
            _problem(case, "error", "failed", outcome.verdict.failure.splitlines()[0], outcome.verdict.failure)
        suite.set("tests", str(len(suite)))
        suite.set("failures", str(len(suite.findall("testcase/failure"))))
        suite.set("errors", str(len(suite.findall("testcase/error"))))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=False)


def github(outcomes: Sequence[Outcome], by: str = "eplbctl verify", noun: str = "scenarios") -> str:
    """Workflow commands that GitHub shows as annotations on the scenario's file, and a closing notice."""
    lines = [line for outcome in outcomes for line in _annotations(outcome)]
    valid = sum(outcome.word == "valid" for outcome in outcomes)
    lines.append(f"::notice title={by}::{valid} of {len(outcomes)} {noun} are valid")
    return "\n".join(lines)


def _case(suite: ElementTree.Element, outcome: Outcome, check: CheckResult) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname=outcome.name, name=check.name)
    if check.status is not Status.VALID:
        _problem(case, _JUNIT_TAG[check.status], check.status.value, _sentence(check), _whole(check))


def _problem(case: ElementTree.Element, tag: str, kind: str, message: str, text: str) -> None:
    problem = ElementTree.SubElement(case, tag, type=kind, message=_NOT_XML.sub("?", message))
    problem.text = _NOT_XML.sub("?", text)


def _annotations(outcome: Outcome) -> Iterator[str]:
    for check in outcome.verdict.checks:
        if check.status is not Status.VALID:
            title = f"{outcome.name}: {check.name} is {check.status.value}"
            yield _annotation(_GITHUB_LEVEL[check.status], outcome, title, _whole(check))
    if outcome.verdict.failure:
        yield _annotation("error", outcome, f"{outcome.name}: the run failed", outcome.verdict.failure)


def _annotation(level: str, outcome: Outcome, title: str, message: str) -> str:
    place = f"file={_property(str(outcome.path))},line=1,title={_property(title)}"
    return f"::{level} {place}::{_data(message)}"


def _sentence(check: CheckResult) -> str:
    return f"{check.observed}; expected {check.expected}"


def _whole(check: CheckResult) -> str:
    return "\n".join(part for part in (_sentence(check), check.where, check.detail) if part)


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
