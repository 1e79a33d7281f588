"""By what packed files are known, and the content of those packed with xz, however much they claim to hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

__all__ = ["GZIP_MAGIC", "XZ_MAGIC", "un_xz"]

GZIP_MAGIC = b"\x1f\x8b"
XZ_MAGIC = b"\xfd7zXZ\0"
_PIECE = 4 << 20
_PACKED = 1 << 18
_MEMORY = 256 << 20
"""What unpacking may take; the strongest preset takes a quarter of it."""


def un_xz(file: BinaryIO) -> Iterator[bytes]:
    """What a file holds, in pieces of a few MiB at most.

    Raises:
        EOFError: it ends before its end.
        ValueError: it is damaged, or unpacking it takes too much memory.
    """
    import lzma  # some builds of Python have none; whoever reads no such file needs none

    decoder = None
    held = file.read(_PACKED)
    while held or decoder is not None:
        if decoder is None:  # another stream follows
            decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY)
        try:
            piece = decoder.decompress(held, _PIECE)
        except lzma.LZMAError as error:
            raise ValueError(str(error)) from error
        if piece:
            yield piece
        if decoder.eof:
            held, decoder = decoder.unused_data or file.read(_PACKED), None
        elif decoder.needs_input:
            held = file.read(_PACKED)
            if not held:
                raise EOFError("the file ends inside its xz stream")
        else:
            held = b""
