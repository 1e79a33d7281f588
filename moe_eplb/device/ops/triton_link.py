"""How kernels of the main stream say that ranks exchange rows, for copies between GPUs that give way to that.

It costs no launch: whatever kernel comes before a collective, or first after it, stores the word.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["tell_link"]


@triton.jit
def tell_link(link, busy: tl.constexpr, tells: tl.constexpr):
    """The first program of a kernel says whether ranks exchange rows from now on."""
    if tells:
        tl.store(link, busy, mask=(tl.program_id(0) == 0) & (tl.program_id(1) == 0))
