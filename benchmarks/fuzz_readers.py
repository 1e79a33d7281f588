"""Coverage-guided fuzzing of the readers and of the analyses behind them, with atheris.

    python benchmarks/fuzz_readers.py [-max_total_time=300] [other options of libFuzzer] [CORPUS_FOLDER]

An interpreter that has atheris is needed besides the project's own needs. Mutations are libFuzzer's own, on packed
files on what is packed, and now and then those of `tests.analysis.fuzz_mutations`. It ends with an error at the first
file that is answered by anything but a capture or a `TraceError`; libFuzzer keeps that file.
"""

from __future__ import annotations

import gzip
import sys
import tempfile
import zlib
from pathlib import Path
from random import Random

import atheris  # type: ignore[import-not-found,unused-ignore]

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

with atheris.instrument_imports(include=["moe_eplb.analysis"]):
    from tests.analysis.fuzz_mutations import FORMS, mutated, samples
    from tests.analysis.fuzz_traces import examine

_LONGEST = 1 << 20
_OURS = 0.1
"""How often a mutation is one of ours."""


def main() -> None:
    """Fuzz until libFuzzer says that it is enough."""
    with tempfile.TemporaryDirectory(prefix="fuzz_readers_") as name:
        folder, corpus = Path(name) / "scratch", Path(name) / "corpus"
        folder.mkdir()
        corpus.mkdir()
        for form, content in samples().items():
            (corpus / form).write_bytes(content)
            (corpus / f"{form}.gz").write_bytes(gzip.compress(content, 1, mtime=0))
        options = [sys.argv[0], f"-max_len={_LONGEST}", "-timeout=30", *sys.argv[1:], str(corpus)]
        atheris.Setup(options, lambda data: _one(folder / "t", data), custom_mutator=_mutated)
        atheris.Fuzz()


def _one(path: Path, data: bytes) -> None:
    examine(path, data, seconds=25)


def _mutated(data: bytes, longest: int, seed: int) -> bytes:
    chance = Random(seed)
    if chance.random() < _OURS:
        return mutated(chance.choice(list(FORMS)), chance)[:longest]
    if data.startswith(b"\x1f\x8b") and chance.random() < 0.8:
        try:
            inner = zlib.decompressobj(wbits=31).decompress(data, _LONGEST)
        except zlib.error:
            inner = b""  # it is damaged already, so the packed bytes are mutated
        if inner:
            return gzip.compress(atheris.Mutate(inner, len(inner) + 64), 1, mtime=0)[:longest]
    return bytes(atheris.Mutate(data, longest))


if __name__ == "__main__":
    main()
