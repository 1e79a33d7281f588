"""What parent and ranks say to each other over their pipe."""

from __future__ import annotations

from typing import NamedTuple

from moe_eplb.core.errors import EplbError

__all__ = ["Done", "Failed", "Job", "Message", "Step", "Timing"]


class Timing(NamedTuple):
    """How variants are compared: rounds of so many steps each, after some that warm up.

    `rehearsal`: so many steps of each variant run first and are forgotten, with all that moved: what they leave behind
    is kernels that are compiled and loaded.
    """

    rounds: int
    steps: int
    warm_up: int
    rehearsal: int = 0


class Job(NamedTuple):
    """Run the scenario of a run folder; with a timing, compare so many variants that the folder holds instead.

    Scenarios travel as files: what is larger than a pipe's buffer waits for its reader, however long that takes.
    """

    folder: str
    variants: int = 0
    timing: Timing | None = None


class Step(NamedTuple):
    """So many iterations are done."""

    done: int
    total: int


class Done(NamedTuple):
    """The job has ended and its files are complete."""


class Failed(NamedTuple):
    """The job ended in an exception: a known error, or another one's traceback."""

    error: EplbError | str


Message = Step | Done | Failed
