"""One thing wrong with a scenario, as the rules find it."""

from __future__ import annotations

from typing import NamedTuple

from moe_eplb.core.yaml_source import Loc

__all__ = ["Problem"]


class Problem(NamedTuple):
    """One thing wrong with a scenario."""

    loc: Loc
    what: str
    hint: str = ""
    code: str = "E032"
