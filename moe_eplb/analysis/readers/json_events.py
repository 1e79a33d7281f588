"""The events of a Chrome trace in batches, from plain or gzip text, without ever holding the whole of it.

A batch is cut where an event ends. A cut is guessed at the last ``}, {`` and proved by parsing: with a closing bracket
appended, text is valid JSON only if the array of events, and nothing inside it, was open at the cut. Where the guess
fails, the exact twin `last_cut` walks over every token.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from moe_eplb.analysis.readers.limits import Limits, too_large
from moe_eplb.core.errors import TraceError
from moe_eplb.core.input_file import open_input
from moe_eplb.core.packed import GZIP_MAGIC

__all__ = ["EventText", "last_cut", "unpacked"]

_PIECE = 4 << 20
_PACKED = 1 << 18
_EVENTS = re.compile(rb'"traceEvents"\s*:\s*\[')
_GUESS = re.compile(rb"\s*,\s*\{")
# A string that does not end is one token too: else each quote in it would be tried as the start of another.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[{}\[\]]', re.DOTALL)
_HEADS = 64
"""Places that look like the start of the events and are tried."""


def unpacked(file: BinaryIO, packed: bool) -> Iterator[bytes]:
    """The text of a file in pieces of a few MiB at most, however much it claims to hold.

    Raises:
        EOFError: a gzip file ends before its end.
        zlib.error: it is damaged.
    """
    if not packed:
        while piece := file.read(_PIECE):
            yield piece
        return
    decoder = zlib.decompressobj(wbits=31)
    held = file.read(_PACKED)
    while held or not decoder.eof:
        if decoder.eof:  # another member follows
            decoder = zlib.decompressobj(wbits=31)
        piece = decoder.decompress(held, _PIECE)
        held = (decoder.unused_data if decoder.eof else decoder.unconsumed_tail) or file.read(_PACKED)
        if not held and not piece and not decoder.eof:
            raise EOFError("the file ends inside its gzip stream")
        if piece:
            yield piece


def last_cut(text: bytes) -> tuple[int, bool]:
    """Where the last whole element of an array ends whose opening bracket stands before `text`; the exact twin.

    Returns:
        Offset behind that element, 0 if there is none, and whether the array itself ends there or right behind it.
    """
    depth = cut = 0
    for token in _TOKEN.finditer(text):
        mark = token[0]
        if mark in (b"{", b"["):
            depth += 1
        elif mark in (b"}", b"]"):
            if not depth:
                return token.start(), True
            depth -= 1
            if not depth:
                cut = token.end()
    return cut, False


class EventText:
    """One file's events and what stands around them.

    Attributes:
        about: Every other value of the outermost object; complete once `batches` has ended.
    """

    def __init__(self, path: Path, limits: Limits) -> None:
        self._path, self._limits = path, limits
        self._held = b""
        self._read = 0
        self._ended = False
        self._some = False
        self.about: dict[str, Any] = {}

    def batches(self) -> Iterator[tuple[bytes, list[Any]]]:
        """Pieces of the array of events: their text, in brackets, and what it says.

        Raises:
            TraceError: E060 no such file, E061 it is cut off, E062 it is damaged, E064 it is too large.
        """
        try:
            with open_input(self._path) as file:
                packed = file.read(2) == GZIP_MAGIC
                file.seek(0)
                pieces = unpacked(file, packed)
                bare = self._skip_to_events(pieces)
                yield from self._events(pieces)
                self._skip_to_end(pieces, bare)
        except OSError as error:
            why = error.strerror or str(error)
            raise TraceError("E060", "a trace cannot be opened", why=why, where=str(self._path)) from error
        except EOFError as error:
            raise self._cut_off(str(error)) from error
        except zlib.error as error:
            raise self._damaged(f"gzip: {error}") from error

    # -- before, between and after the events ----------------------------------------------------------------------

    def _skip_to_events(self, pieces: Iterator[bytes]) -> bool:
        """Hold the text from the first event on; whether the file is a bare array."""
        tried = heads = 0
        while True:
            start = self._held.lstrip()[:1]
            if start == b"[":
                self._held = self._held.lstrip()[1:]
                return True
            if start not in (b"", b"{"):
                raise self._damaged("it starts with neither { nor [")
            for found in _EVENTS.finditer(self._held, tried):
                heads += 1
                if heads > _HEADS:
                    raise self._damaged(f"{_HEADS} texts look like the start of the events, none of them is")
                head = _parsed(self._held[: found.end()] + b"]}")
                if isinstance(head, dict):
                    self.about |= {key: value for key, value in head.items() if key != "traceEvents"}
                    self._held = self._held[found.end() :]
                    return False
            tried = max(0, len(self._held) - 64)  # the key may straddle two pieces
            if not self._more(pieces):
                raise self._no_events()

    def _events(self, pieces: Iterator[bytes]) -> Iterator[tuple[bytes, list[Any]]]:
        open_ended = False
        while not self._ended:
            open_ended = not self._more(pieces)
            batch = self._guessed_batch() or self._exact_batch()
            if batch is not None:
                yield batch
            elif open_ended:
                raise self._cut_off("the events have no closing bracket")

    def _guessed_batch(self) -> tuple[bytes, list[Any]] | None:
        at = self._held.rfind(b"}", 0, max(0, len(self._held) - 1))
        for _ in range(3):  # the last brackets may be those of an event's arguments
            if at <= 0 or _GUESS.match(self._held, at + 1):
                break
            at = self._held.rfind(b"}", 0, at)
        text = self._in_brackets(self._held[: at + 1]) if at > 0 else b""
        events = _parsed(text)
        if not isinstance(events, list):
            return None
        self._held, self._some = self._held[at + 1 :], True
        return text, events

    def _exact_batch(self) -> tuple[bytes, list[Any]] | None:
        cut, ended = last_cut(self._held)
        if not cut and not ended:
            return None
        text = self._in_brackets(self._held[:cut])
        try:
            events = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise self._damaged(f"{error}, in the {len(text)} bytes before byte {self._read}") from error
        self._held, self._ended, self._some = self._held[cut + ended :], ended, True
        return text, events

    def _in_brackets(self, text: bytes) -> bytes:
        """An array of its own, without the comma that parts it from what was read before."""
        text = text.lstrip()
        if self._some and text.startswith(b","):
            text = text[1:]
            return b"[" + text + b"]" if text.strip() else b"[,]"
        return b"[" + text + b"]" if not (self._some and text) else b"[,]"

    def _skip_to_end(self, pieces: Iterator[bytes], bare: bool) -> None:
        while self._more(pieces):
            if bare and self._held.strip():
                break
        rest = self._held.strip()
        if bare and rest:
            raise self._damaged("text follows the array of events")
        if not bare:
            tail = _parsed(b'{"":0' + rest)
            if not isinstance(tail, dict):
                raise (
                    self._cut_off("the outermost object is not closed")
                    if not rest.endswith(b"}")
                    else self._damaged("what follows the events is no JSON")
                )
            self.about |= {key: value for key, value in tail.items() if key}
        self._held = b""

    def _more(self, pieces: Iterator[bytes]) -> bool:
        """Hold one piece more, if there is one."""
        piece = next(pieces, b"")
        self._read += len(piece)
        self._held += piece
        if self._read > self._limits.text_bytes:
            raise too_large(self._path, f"more than {self._limits.text_bytes} bytes of text", f"byte {self._read}")
        if len(self._held) > self._limits.piece_bytes + _PIECE:
            raise too_large(
                self._path, f"more than {self._limits.piece_bytes} bytes without a whole event", f"byte {self._read}"
            )
        return bool(piece)

    def _no_events(self) -> TraceError:
        if not self._held.strip():
            return TraceError("E063", "a trace is empty", why=f"{self._read} bytes", where=str(self._path))
        if isinstance(_parsed(self._held), dict):
            return self._damaged("it has no traceEvents")
        return self._cut_off("it ends before its events")

    def _cut_off(self, why: str) -> TraceError:
        why = f"{why}; {self._read} bytes of text were read"
        return TraceError("E061", "a trace is cut off", why=why, where=str(self._path), hint="write or copy it again")

    def _damaged(self, why: str) -> TraceError:
        return TraceError("E062", "a trace is damaged", why=why, where=str(self._path))


def _parsed(text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
