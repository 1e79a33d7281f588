"""Files made to do harm: nothing in them runs, none takes more memory or time than its size allows."""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from moe_eplb.core.errors import EplbError, ScenarioError
from moe_eplb.planning.formats import files
from moe_eplb.planning.formats.loads import read_counts
from moe_eplb.planning.formats.placements import read_placement

from .drawn import COUNTS, per_pass_dump, stat_dump, statistics


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Path]:
    """A file that exists once a payload has run."""
    path = tmp_path / "trap" / "owned"
    path.parent.mkdir()
    yield path
    assert not path.exists()


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Half a GiB more than there is now: a file that asks for more fails here, and not on a user's machine."""
    import torch  # its libraries are mapped before the limit

    torch.zeros(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (512 << 20), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def refused(path: Path, *codes: str) -> None:
    """That neither loads nor a placement are read from it."""
    for read in (read_counts, lambda path: read_placement(path, ranks=1)):
        with pytest.raises(EplbError) as caught:
            read(path)
        assert caught.value.code in codes, caught.value
        assert int(caught.value.exit_code) == 2
        assert "weights_only" not in str(caught.value)


def archive(path: Path, pickled: bytes, *, kind: int = zipfile.ZIP_STORED, **more: bytes) -> Path:
    """A zip archive as torch makes them, with a pickle of ours."""
    with zipfile.ZipFile(path, "w", kind) as made:
        made.writestr("a/data.pkl", pickled)
        made.writestr("a/version", b"3\n")
        made.writestr("a/byteorder", b"little")
        for name, content in more.items():
            made.writestr(f"a/{name}", content)
    return path


def test_the_payload_would_run(tmp_path: Path) -> None:
    """Else the tests below would prove nothing."""
    torch.save({"logical_count": Payload(tmp_path / "owned")}, tmp_path / "a.pt")
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize("key", ["logical_count", "records", "misc_objects"])
def test_payloads_in_dumps_are_not_run(tmp_path: Path, trap: Path, key: str) -> None:
    stat_dump(tmp_path / "a.pt", COUNTS, **{key: Payload(trap)})
    refused(tmp_path / "a.pt", "E197")
    per_pass_dump(tmp_path / "b.pt", 0, [[0, 1]], [(1, np.ones((1, 2)))], **{key: Payload(trap)})
    refused(tmp_path / "b.pt", "E197")
    folder = tmp_path / "folder"
    folder.mkdir()
    per_pass_dump(folder / "0.pt", 0, [[0, 1]], [(1, np.ones((1, 2)))])
    (tmp_path / "b.pt").rename(folder / "1.pt")
    with pytest.raises(ScenarioError, match=r"asks for '__builtin__\.getattr'") as caught:
        read_counts(folder)
    assert caught.value.code == "E197"
    assert "nothing of it was run" in caught.value.why


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_payloads_in_every_kind_of_pickle_are_not_run(tmp_path: Path, trap: Path, protocol: int) -> None:
    pickled = pickle.dumps({"logical_count": Payload(trap)}, protocol)
    refused(archive(tmp_path / "a.pt", pickled), "E197")
    (tmp_path / "b.pt").write_bytes(pickled)
    refused(tmp_path / "b.pt", "E197", "E041", "E021", "E031")
    if protocol >= 2:
        refused(tmp_path / "b.pt", "E197")


@pytest.mark.parametrize(
    "pickled",
    [
        b"(S'touch {0}'\nios\nsystem\n.", b"cos\nsystem\n(S'touch {0}'\ntR.", b"\x80\x02\x82\x01.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x07touch {0}\x85R.", b"\x80\x02ctorch\nload\nU\x01a\x85R.",
        b"c__builtin__\neval\n(S'1'\ntR.", b"cbuiltins\nbytearray\nL99999999999L\n\x85R.",
        b"ctorch\nTensor\n(J\x00\x00\x00\x40tR.", b"ccollections\nCounter\n)R.", b"ctorch.serialization\nload\n.",
    ],
)  # fmt: skip
def test_whatever_a_pickle_names_is_not_called(tmp_path: Path, trap: Path, pickled: bytes) -> None:
    refused(archive(tmp_path / "a.pt", pickled.replace(b"{0}", str(trap).encode())), "E197")


@pytest.mark.parametrize(
    "pickled", [b"", b".", b"\x80\x02", b"garbage", b"\x80\x02N", b"\x80\x02h\x05.", b"\x80\x02]" * 20_000, b"a" * 50]
)
def test_damaged_pickles(tmp_path: Path, pickled: bytes) -> None:
    refused(archive(tmp_path / "a.pt", pickled), "E040", "E041")


def test_archives_with_other_things_in_them(tmp_path: Path) -> None:
    good = pickle.dumps({"a": 1}, 2)
    refused(archive(tmp_path / "a.pt", good, **{"b/data.pkl": good}), "E040")
    refused(archive(tmp_path / "b.pt", good, **{"data/0": b"1"}), "E041")
    with zipfile.ZipFile(tmp_path / "c", "w") as made:
        made.writestr("hello", "hello")
    refused(tmp_path / "c", "E040", "E041")


@pytest.mark.usefixtures("little_memory")
def test_bombs_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_BYTES", 1 << 20)
    zeros = b"\x00" * (8 << 20)
    refused(archive(tmp_path / "a.pt", b"N.", kind=zipfile.ZIP_DEFLATED, **{"data/0": zeros}), "E040")
    monkeypatch.setattr("moe_eplb.core.recorded._MOST_BYTES", 1 << 20)
    np.savez_compressed(tmp_path / "b.npz", counts=np.zeros((1, 1, 1 << 20), np.int64))
    refused(tmp_path / "b.npz", "E040")
    np.savez_compressed(tmp_path / "c.npz", topk_ids=np.zeros((1 << 20, 1, 1), np.int64))
    refused(tmp_path / "c.npz", "E040")


@pytest.mark.usefixtures("little_memory")
def test_sizes_that_are_only_claimed(tmp_path: Path) -> None:
    for shape in ((1 << 40,), (1 << 20, 1 << 10, 1 << 10), (1, 1, 1 << 62), (1 << 33, 1 << 33, 1 << 33)):
        header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}".encode()
        header += b" " * (-(len(header) + 11) % 64) + b"\n"
        npy = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"\x00" * 64
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as made:
            made.writestr("counts.npy", npy)
        refused(tmp_path / "a.npz", "E040")
        (tmp_path / "a.npy").write_bytes(npy)
        refused(tmp_path / "a.npy", "E040", "E041")
    wide = torch.zeros(1, dtype=torch.int32).expand(1 << 12, 1 << 12, 1 << 12)
    for key in ("logical_count", "physical_to_logical_map"):
        torch.save({key: wide}, tmp_path / "b.pt")
        assert (tmp_path / "b.pt").stat().st_size < 4096
        refused(tmp_path / "b.pt", "E041")
    np.savez(tmp_path / "c.npz", topk_ids=np.zeros((2, 1, 1), int), num_experts=1 << 40)
    refused(tmp_path / "c.npz", "E040", "E041")


@pytest.mark.parametrize(
    "header",
    [
        {"m": {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 16]}},
        {"m": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 1 << 50]}},
        {"m": {"dtype": "F32", "shape": [2, 2], "data_offsets": [8, 0]}},
        {"m": {"dtype": "F32", "shape": [-2, 2], "data_offsets": [0, 16]}},
        {"m": {"dtype": "BF16", "shape": [2, 4], "data_offsets": [0, 16]}},
        {"m": {"dtype": "OBJECT", "shape": [2, 2], "data_offsets": [0, 16]}}, {"m": 3},
    ],
)  # fmt: skip
def test_tensors_that_are_not_there(tmp_path: Path, header: Any) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises(ScenarioError) as caught:
        read_counts(tmp_path / "a")
    assert caught.value.code in ("E040", "E041")


@pytest.mark.parametrize("length", [0, 3, 1 << 31, (1 << 32) - 1])
def test_headers_of_another_length(tmp_path: Path, length: int) -> None:
    (tmp_path / "a").write_bytes(struct.pack("<Q", length) + b'{"m":1}' + b"[" * 1000)
    with pytest.raises(ScenarioError) as caught:
        read_counts(tmp_path / "a")
    assert caught.value.code == "E040"


def test_arrays_of_objects_are_not_opened(tmp_path: Path, trap: Path) -> None:
    evil = Payload(trap)
    np.savez(tmp_path / "a.npz", counts=np.ones((1, 1, 2), int), layer_ids=np.array([evil], object))
    np.savez(tmp_path / "b.npz", counts=np.array([[[evil]]], object))
    np.savez(tmp_path / "c.npz", topk_ids=np.array([[[evil]]], object))
    for name in ("a.npz", "b.npz", "c.npz"):
        refused(tmp_path / name, "E040")
    np.save(tmp_path / "d.npy", np.array([[[evil]]], object))
    refused(tmp_path / "d.npy", "E040", "E041")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000 + "]" * 200_000, '{"a":' * 200_000, '{"logical_count": ' + "[" * 900 + "]" * 900 + "}",
        '{"format": "moe_eplb loads", "version": ' + "[" * 900 + "]" * 900 + "}",
        '{"format": "moe_eplb placement", "version": 1, "ranks": ' + "[" * 900 + "]" * 900 + "}",
        '{"physical_to_logical_map": ' + "[" * 900 + "]" * 900 + "}", '{"layer_list": ' + "[" * 900 + "]" * 900 + "}",
        '{"logical_count": [[' + "9" * 5000 + "]]}", '{"layer_list": [{"layer_id": ' + "9" * 5000 + "}]}",
        json.dumps({f"k{i}": 1 for i in range(200_000)}),
        '{"moe_layer_count": ' + '{"a":' * 900 + "1" + "}" * 900 + ', "layer_list": []}',
    ],
)  # fmt: skip
def test_deep_and_long_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "a").write_text(text)
    refused(tmp_path / "a", "E041")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "E040")
    refused(Path("/dev/zero"), "E040")
    folder = statistics(tmp_path / "s", [{"0_0": [1, 2, 3]}])
    for name in ("rank0.safetensors", "meta_info.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(ScenarioError) as caught:
            read_counts(folder)
        assert caught.value.code == "E040"
    dumps = tmp_path / "dumps"
    dumps.mkdir()
    os.mkfifo(dumps / "a.pt")
    with pytest.raises(ScenarioError) as caught:
        read_counts(dumps)
    assert caught.value.code == "E040"


def test_files_of_others_are_not_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_NUMBERS", 5)
    monkeypatch.setattr(files, "MOST_BYTES", 50)
    monkeypatch.setattr(files, "_MOST_JSON", 100)
    (tmp_path / "a").write_bytes(save({"m": COUNTS[0].astype(np.float32)}))
    (tmp_path / "b").write_text(json.dumps({"logical_count": COUNTS.tolist() * 10}))
    for name in ("a", "b"):
        with pytest.raises(ScenarioError) as caught:
            read_counts(tmp_path / name)
        assert caught.value.code == "E040"
    monkeypatch.undo()
    monkeypatch.setattr(files, "MOST_NUMBERS", 5)
    with pytest.raises(ScenarioError, match="too large"):
        read_counts(tmp_path / "a")
