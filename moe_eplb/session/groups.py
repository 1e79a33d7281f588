"""Process groups: the model's, the balancer's and the checks' collectives never share one.

The statistics' has one channel where it is NCCL's: a sum of a few kilobytes needs no more, and each further one takes a
multiprocessor from the model's work beside it.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

__all__ = ["Groups", "GroupsBySize"]


@dataclass(frozen=True, slots=True)
class Groups:
    """Groups of the same ranks for dispatch and combine, for statistics, for set-up exchanges, and for checks."""

    model: dist.ProcessGroup | None
    statistics: dist.ProcessGroup | None
    setup: dist.ProcessGroup | None
    checks: dist.ProcessGroup | None


class GroupsBySize:
    """Groups over the first n ranks, made when first needed and kept.

    Every rank of the world takes part in making them, members or not: the groups' names count the groups made before,
    and ranks that had sat one out would look for another name.
    """

    def __init__(self, timeout_s: float = 600.0) -> None:
        self._timeout = datetime.timedelta(seconds=timeout_s)
        self._made: dict[tuple[int, str], Groups] = {}

    def of(self, size: int, fast: str = "gloo") -> Groups:
        """The groups over ranks 0 to size - 1, none for one rank; called by all ranks of the world.

        The model's tensors and the statistics travel through the backend `fast`, everything else through gloo.
        """
        if (size, fast) not in self._made:
            self._made[size, fast] = self._make(size, fast) if size > 1 else Groups(None, None, None, None)
        return self._made[size, fast]

    def _make(self, size: int, fast: str) -> Groups:
        wanted = {
            "model": (fast, None),
            "statistics": (fast, self._one_channel() if fast == "nccl" else None),
            "setup": ("gloo", None),
            "checks": ("gloo", None),
        }
        made = {
            name: dist.new_group(list(range(size)), timeout=self._timeout, backend=backend, pg_options=options)
            for name, (backend, options) in wanted.items()
        }
        return Groups(**made)

    def _one_channel(self) -> Any:
        options = dist.ProcessGroupNCCL.Options()
        options.config.min_ctas = options.config.max_ctas = 1
        options._timeout = self._timeout
        return options
