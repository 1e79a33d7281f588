"""Times of Chrome traces: microseconds, whole or with three decimals, as whole ns.

They become ns without a detour over floating point where that would cost digits: a float holds three decimals of a
microsecond exactly enough below 2**43 us, and larger ones are taken from the text.
"""

from __future__ import annotations

import re
from array import array
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FloatsTooCoarse", "exact_times", "nanoseconds"]

_SAFE_US = float(1 << 43)
"""Below it neighbouring floats lie less than a thousandth apart, so that the nearest ns is the one that was meant."""
_LATEST_US = 1 << 52
_TIME = re.compile(rb'(?<!\\)"(ts|dur)"(\s*:\s*)(-?\d+)\.(\d+)(?=[\s,}])')
_MARK = "ns:"


class FloatsTooCoarse(Exception):
    """Times with decimals beyond what a float holds."""


def exact_times(text: bytes) -> bytes:
    """JSON text with every time that has decimals as marked text of whole ns, so that no parser makes a float of it."""

    def whole(found: re.Match[bytes]) -> bytes:
        key, colon, before, decimals = found.groups()
        after = int(decimals[:3].ljust(3, b"0")) + (decimals[3:4] >= b"5")
        value = abs(int(before)) * 1000 + after
        return b'"%b"%b"%b%b%d"' % (key, colon, _MARK.encode(), b"-" if before.startswith(b"-") else b"", value)

    return _TIME.sub(whole, text)


def nanoseconds(values: list[Any], exact: bool = False) -> NDArray[np.int64]:
    """Times in us as whole ns; finer ones are rounded.

    Args:
        values: Whole numbers or floats.
        exact: They come from `exact_times`, so that there may be texts of ns among them.

    Raises:
        FloatsTooCoarse: there are decimals that floats of this size do not hold.
        TypeError: a value is no number. ValueError: it is not finite. OverflowError: it is beyond 142 years.
    """
    try:
        whole = np.frombuffer(array("q", values), np.int64) if values else np.empty(0, np.int64)
    except TypeError:
        return _from_decimals(values, exact)
    if len(whole) and max(int(whole.max()), -int(whole.min())) > _LATEST_US:
        raise OverflowError(f"a time of {int(whole.max())} us")
    return whole * 1000


def _from_decimals(values: list[Any], exact: bool) -> NDArray[np.int64]:
    kinds = set(map(type, values))
    if exact and kinds <= {int, str}:
        return np.frombuffer(array("q", [_from_text(v) if type(v) is str else v * 1000 for v in values]), np.int64)
    if not kinds <= {int, float}:
        raise TypeError(f"times are of types {', '.join(sorted(kind.__name__ for kind in kinds))}")
    floats = np.array(values, np.float64)
    largest = float(np.abs(floats).max())
    if not np.isfinite(largest):
        raise ValueError("a time is not finite")
    if largest >= _LATEST_US:
        raise OverflowError(f"a time of {largest} us")
    if largest >= _SAFE_US:
        raise FloatsTooCoarse
    whole = np.floor(floats)
    return whole.astype(np.int64) * 1000 + np.rint((floats - whole) * 1000).astype(np.int64)


def _from_text(value: str) -> int:
    if not value.startswith(_MARK):
        raise TypeError(f"a time is the text {value[:40]!r}")
    number = int(value[len(_MARK) :])
    if abs(number) > _LATEST_US * 1000:
        raise OverflowError(f"a time of {number} ns")
    return number
