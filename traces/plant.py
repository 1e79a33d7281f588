"""Makes the captures of `good_captures` and `bad_captures` and writes down what must be said of the bad ones.

    python -m traces.plant

The same code writes the same bytes. `captures.yaml` says for each bad one which check rejects it, how, and what else
that costs: what a trace lacks makes every answer on the order of calls and work unknown.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moe_eplb.core import yaml_source
from traces.defects import BAD, GOOD, Bad
from traces.files import write

__all__ = ["plant"]

_HERE = Path(__file__).resolve().parent
_HEAD = "# Written by traces/plant.py: each file of bad_captures, its good twin, and what must be said of it.\n"


def plant(target: Path = _HERE) -> None:
    """Write all of them anew, and remove what is none of them."""
    for folder, made in (("good_captures", _good), ("bad_captures", _bad)):
        (target / folder).mkdir(exist_ok=True)
        written = set(made(target / folder))
        for path in (target / folder).iterdir():
            if path not in written:
                path.unlink()
    manifest = {bad.name: _said(bad) for bad in BAD}
    (target / "captures.yaml").write_text(_HEAD + yaml_source.dump(manifest), encoding="utf-8")


def _good(folder: Path) -> Iterator[Path]:
    for good in GOOD:
        write(good.job(), good.form, folder / good.name)
        yield folder / good.name


def _bad(folder: Path) -> Iterator[Path]:
    for bad in BAD:
        job = bad.twin.job()
        bad.plant(job)
        write(job, bad.twin.form, folder / bad.name)
        yield folder / bad.name


def _said(bad: Bad) -> dict[str, object]:
    said: dict[str, object] = {"twin": bad.twin.name, "check": bad.check, "status": bad.status}
    return said | ({"code": bad.code} if bad.code else {}) | ({"also": bad.also} if bad.also else {})


if __name__ == "__main__":
    plant()
