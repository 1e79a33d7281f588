"""What a rank writes down for the judge: one JSON object a line, facts only, no judgement.

The running half appends rows through `EvidenceWriter`; `moe_eplb.analysis.verdict` reads them. Every row carries
``row`` (one of `Row`), ``rank``, ``layer`` and ``iteration`` (-1 where they do not apply).
"""

from __future__ import annotations

import enum
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from moe_eplb.core.errors import TraceError
from moe_eplb.core.input_file import read_input

__all__ = ["EvidenceWriter", "Row", "read_evidence"]


class Row(enum.StrEnum):
    """Kinds of evidence. The fields beside the common ones:

    BEGIN        pid, ranks, layers, experts, slots, top_k, dynamic (bool), off (reason or "")
    ROUTED       counts [E]: routed (token, k) entries per expert on this rank, counted by the checker from the ids;
                 this row and EXPECTED, RECEIVED, DISPATCH are sums over all chunks and repeats of the layer
    EXPECTED     slots [P]: entries per slot that the replica rule must give for those ids, by an independent twin
    RECEIVED     slots [P/R]: entries per local slot that this rank's experts really processed
    DISPATCH     expected, once, missing, duplicated, wrong_expert, invalid_slot, first (str): by source rank
    REDUCED      counts [E]: the reduced statistics as the balancer folded them
    BALANCE      value: the balancedness the balancer itself reported for this iteration
    PLACEMENT    digest (int), slots [P]: the placement whose tables this iteration's route used; slots only when they
                 differ from the rank's previous row of the layer
    PLAN         taken, due, digest, changed [global slot ids], bytes, predicted [R] rank loads, stall_us (how long
                 the model waited for it), awaited_us (how long the thread that launches did, while the device may
                 have had work)
    COMMIT       digest, changed [global slot ids], local_changed [local slot ids], bytes, sources {host, own or peer:
                 bytes}: whether they were copied from the host, from this rank's or from another rank's slots
    DROPPED      due, ready, ranks, digests_differ (bool), reason, stall_us, awaited_us
    ATTEST       slots (checked), mismatched [[global slot, expected expert, found digest]], changed_bytes (how many
                 slots have another digest than at the previous attestation); the first one is made in iteration -1
    EQUALITY     max_abs, max_ref, ratio, tolerance, tokens, misrouted (tokens sent to other experts than the twin of
                 the routing method chooses): the worst of the layer's forwards in the iteration, tokens
                 in sum; shared_ratio, shared_tokens: the same of its shared expert, and block_ratio, block_tokens: of
                 the sum of both, which the block returns; 0 where it has none
    GENERATED    tokens, expected [[ids of a sequence]]: what this rank's whole model says next after each token of the
                 text that the same model generates with its own MoE blocks, and that text; gaps [[number or null]]: by
                 how much of its largest logit the other model likes a token of ours less than its own, null where it
                 is not among its best
    MEMORY       slots_bytes, host_bytes: measured; staging_bytes: the most that updates under way can hold
    CALL         index, call, error {code, what} or null, expected (bool)
    LEAK         threads [names], segments [names], pending (thunks left on streams), balancer (bool)
    END          iterations, seconds, peak_rss_bytes
    """

    BEGIN = "begin"
    ROUTED = "routed"
    EXPECTED = "expected"
    RECEIVED = "received"
    DISPATCH = "dispatch"
    REDUCED = "reduced"
    BALANCE = "balance"
    PLACEMENT = "placement"
    PLAN = "plan"
    COMMIT = "commit"
    DROPPED = "dropped"
    ATTEST = "attest"
    EQUALITY = "equality"
    GENERATED = "generated"
    MEMORY = "memory"
    CALL = "call"
    LEAK = "leak"
    END = "end"


_COMMON = {"row": str, "rank": int, "layer": int, "iteration": int}
"""Fields of every row, whatever its kind."""


class EvidenceWriter:
    """Appends evidence rows of one rank to a file; what was written survives the rank's death."""

    def __init__(self, path: Path, rank: int) -> None:
        self._file: IO[str] = path.open("w", encoding="utf-8")
        self._rank = rank

    def write(self, row: Row, layer: int = -1, iteration: int = -1, **fields: Any) -> None:
        """Append one row; values must be plain JSON types."""
        record = {"row": row.value, "rank": self._rank, "layer": layer, "iteration": iteration, **fields}
        self._file.write(json.dumps(record, separators=(",", ":")) + "\n")

    def flush(self) -> None:
        """Hand the rows written so far to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close."""
        self._file.close()


def read_evidence(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of one file in order. A last line cut off by a dying rank is left out; any other damage is an error."""
    try:
        lines = read_input(path).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise TraceError("E050", "the evidence file is no text", why=str(error), where=str(path)) from error
    except OSError as error:
        why = error.strerror or str(error)
        raise TraceError("E050", "the evidence file cannot be read", why=why, where=str(path)) from error
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                return
            raise TraceError(
                "E050", "the evidence file is damaged", why=str(error), where=f"{path}:{number}"
            ) from error
        if not isinstance(row, dict) or any(type(row.get(name)) is not kind for name, kind in _COMMON.items()):
            raise TraceError("E050", "the evidence file holds a line that is no row", where=f"{path}:{number}")
        yield row
