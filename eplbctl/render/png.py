"""Small pictures without any library: one byte a pixel, a palette of colours."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence

__all__ = ["data_uri", "png"]


def png(rows: Sequence[bytes], palette: Sequence[tuple[int, int, int]]) -> bytes:
    """A PNG (ISO/IEC 15948) whose pixels are places in a palette of up to 256 colours; all rows are as long."""
    width, height = len(rows[0]), len(rows)
    head = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    colours = bytes(value for colour in palette for value in colour)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows), 9)
    parts = [_chunk(b"IHDR", head), _chunk(b"PLTE", colours), _chunk(b"IDAT", pixels), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def data_uri(picture: bytes) -> str:
    """The picture as an address that needs no other file."""
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
