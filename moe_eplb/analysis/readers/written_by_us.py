"""What a converted or merged export of ours says beside Nsight Systems' tables, as pairs in `META_DATA_CAPTURE`."""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["NOTE_KEY", "RANK_KEY", "notes", "ranks"]

RANK_KEY = "EPLB_RANK_OF_PROCESS_"
"""The rank of a process, by its global number."""
NOTE_KEY = "EPLB_NOTE_"
"""A note on the traces that the export was made of, by its place."""
_NOTES, _NOTE = 100, 500
_RANK_KEY = re.compile(RANK_KEY + r"(\d{1,19})")


def ranks(pairs: Mapping[str, str]) -> dict[int, int]:
    """Ranks by process."""
    found = ((_RANK_KEY.fullmatch(name), value) for name, value in pairs.items())
    return {int(match[1]): int(value) for match, value in found if match and re.fullmatch(r"[0-9]{1,6}", value)}


def notes(pairs: Mapping[str, str]) -> list[str]:
    """The first notes, each cut off where it is too long."""
    keys = [f"{NOTE_KEY}{number}" for number in range(_NOTES)]
    return [pairs[key][:_NOTE] for key in keys if key in pairs]
