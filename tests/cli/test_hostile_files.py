"""Files that a scenario names: recorded loads, a balancer's file, a model's configuration, and what stands there."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from .conftest import Call
from .test_hostile_input import MODEL, assert_one_error, link_to, loop, small


def npz(**arrays: object) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


COUNTS = np.ones((1, 2, 4), dtype=np.int64)
IDS = np.tile(np.array([0, 1]), (64, 2, 1))


def _encrypted() -> bytes:
    data = bytearray(npz(counts=COUNTS))
    for header in (b"PK\x03\x04", b"PK\x01\x02"):
        data[data.index(header) + (6 if header[2] == 3 else 8)] |= 1
    return bytes(data)


def _bomb() -> bytes:
    file = io.BytesIO()
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1099511627776, 2, 4), }"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("counts.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    return file.getvalue()


RECORDED: dict[str, tuple[bytes, str, str]] = {
    "nothing": (b"", "E040", "read"),
    "junk": (b"\x00\xff" * 100, "E040", "read"),
    "text": (b"counts: 1\n", "E040", "read"),
    "half a file": (npz(counts=COUNTS)[:150], "E040", "read"),
    "a pickle": (npz(counts=np.array([{}, None], dtype=object)), "E040", "read"),
    "encrypted": (_encrypted(), "E040", "encrypted"),
    "a promise of a terabyte": (_bomb(), "E040", "read"),
    "no array of ours": (npz(other=COUNTS), "E041", "nothing"),
    "both arrays": (npz(counts=COUNTS, topk_ids=IDS), "E041", "either"),
    "negative counts": (npz(counts=-COUNTS), "E041", "negative"),
    "broken counts": (npz(counts=COUNTS + 0.5), "E041", "integers"),
    "counts of words": (npz(counts=COUNTS.astype(str)), "E041", "integers"),
    "two dimensions": (npz(counts=COUNTS[0]), "E041", "three dimensions"),
    "no window": (npz(counts=COUNTS[:0]), "E041", "none of them empty"),
    "zeros": (npz(counts=COUNTS * 0), "E041", "without any count"),
    "too few layers": (npz(counts=COUNTS[:, :1]), "E041", "layers 1 in the file, 2 in the model"),
    "other experts": (npz(counts=COUNTS[:, :, :3]), "E041", "experts 3 in the file, 4 in the model"),
    "another top_k": (npz(topk_ids=IDS[:, :, :1]), "E041", "top_k 1 in the file, 2 in the model"),
    "negative ids": (npz(topk_ids=IDS - 1), "E041", "out of range"),
    "huge ids": (npz(topk_ids=IDS + 2**40), "E041", "out of range"),
    "unknown experts": (npz(topk_ids=IDS + 4), "E041", "experts 6 in the file"),
    "an expert twice": (npz(topk_ids=IDS * 0), "E041", "twice"),
    "too few tokens": (npz(topk_ids=IDS[:20]), "E042", "runs out"),
    "a wrong number of experts": (npz(topk_ids=IDS, num_experts=np.int64(1)), "E041", "num_experts"),
}  # fmt: skip


@pytest.mark.parametrize("what", RECORDED)
def test_bad_recorded_files(what: str, call: Call) -> None:
    content, code, words = RECORDED[what]
    Path("r.npz").write_bytes(content)
    Path("s.yaml").write_text(small("{kind: zipf,", "{kind: recorded, path: r.npz,"))
    answer = call("run", "s.yaml")
    assert (answer.code, answer.out) == (2, "")
    assert_one_error(answer.err, code, "r.npz", words)


def balancer(text: str) -> str:
    Path("named").write_text(text)
    return small("{slots_per_rank: 3, layer_updates_per_iter: 1}", "{config: named}")


SIX, SLOTS = "num_slots: 6\ninitial_global_assignments:", "[0, 1, 2, 3, 0, 1]"
BALANCERS: dict[str, tuple[str, str, str]] = {
    "nothing": ("", "E025", "named"),
    "a list": ("[1]", "E031", "named"),
    "no slots": ("layer_updates_per_iter: 1\n", "E031", "named:1:1"),
    "no slot": ("num_slots: 0\n", "E031", "named:1:12"),
    "a misspelt key": ("num_slot: 6\n", "E031", "named:1:1"),
    "slots that do not divide": ("num_slots: 7\n", "E032", "s.yaml:6:"),
    "a negative layer": (f"{SIX} {{-1: {SLOTS}, 0: {SLOTS}}}\n", "E032", "named:2:34"),
    "a layer that is a word": (f"{SIX} {{a: {SLOTS}}}\n", "E031", "named:2:"),
    "too few slots": (f"{SIX} {{0: [0, 1]}}\n", "E032", "named:2:33"),
    "a negative expert": (f"{SIX} {{0: [0, 1, 2, 3, -1, 0]}}\n", "E032", "named:2:33"),
    "a huge expert": (f"{SIX} {{0: [0, 1, 2, 3, 99999999999, 0]}}\n", "E032", "named:2:33"),
    "other ranks": ("num_slots: 6\nep_size: 4\n", "E032", "s.yaml:6:"),
    "deep": ("x: " + "[" * 1000, "E023", "named:1:"),
}  # fmt: skip


@pytest.mark.parametrize("what", BALANCERS)
def test_bad_balancer_files(what: str, call: Call) -> None:
    text, code, where = BALANCERS[what]
    Path("s.yaml").write_text(balancer(text))
    answer = call("run", "s.yaml")
    assert (answer.code, answer.out) == (2, "")
    assert_one_error(answer.err, code, where, "")


MIXTRAL = {
    "model_type": "mixtral", "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2,
    "num_experts_per_tok": 2, "num_local_experts": 4,
}  # fmt: skip
CONFIGS: dict[str, tuple[str | bytes, str]] = {
    "nothing": ("", "E043"),
    "half": ('{"model_type": "mix', "E043"),
    "a list": ("[]", "E043"),
    "null": ("null", "E043"),
    "binary": (b"\xff\xfe\x00", "E043"),
    "deep": ("[" * 200_000, "E043"),
    "deep inside": ('{"a":' * 100_000, "E043"),
    "huge": (json.dumps(MIXTRAL | {"x": "y" * (2 << 20)}), "E043"),
    "a number of many digits": ('{"hidden_size": ' + "9" * 6000 + "}", "E043"),
    "another model": (json.dumps(MIXTRAL | {"model_type": "llama"}), "E044"),
    "a model type that is a list": (json.dumps(MIXTRAL | {"model_type": []}), "E044"),
    "a model type that is a mapping": (json.dumps(MIXTRAL | {"model_type": {}}), "E044"),
    "quantised": (json.dumps(MIXTRAL | {"quantization_config": {"bits": 4}}), "E044"),
    "no layers": (json.dumps(MIXTRAL | {"num_hidden_layers": 0}), "E045"),
    "too many layers": (json.dumps(MIXTRAL | {"num_hidden_layers": 10**12}), "E045"),
    "no experts": (json.dumps({k: v for k, v in MIXTRAL.items() if "local" not in k}), "E045"),
    "a size that is a list": (json.dumps(MIXTRAL | {"hidden_size": [16]}), "E045"),
    "a size that is infinite": (json.dumps(MIXTRAL | {"hidden_size": float("inf")}), "E045"),
    "architectures that are numbers": (json.dumps(MIXTRAL | {"architectures": [1]}), "E045"),
    "more experts than we know": (json.dumps(MIXTRAL | {"num_local_experts": 5000}), "E031"),
}  # fmt: skip


@pytest.mark.parametrize("what", CONFIGS)
def test_bad_configurations_of_a_model(what: str, call: Call) -> None:
    content, code = CONFIGS[what]
    Path("named").mkdir()
    Path("named/config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    text = small(MODEL, "{hf: named, part: blocks}")
    Path("s.yaml").write_text(text)
    answer = call("run", "s.yaml")
    assert (answer.code, answer.out) == (2, "")
    assert_one_error(answer.err, code, "named/config.json" if code != "E031" else "s.yaml", "")


NAMED: dict[str, tuple[str, str, str]] = {
    "recorded": ("{kind: zipf,", "{kind: recorded, path: %s,", "E040"),
    "balancer": ("{slots_per_rank: 3, layer_updates_per_iter: 1}", "{config: %s}", "E020"),
    "model": (MODEL, "{hf: %s, part: blocks}", "E043"),
}
WRONG: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a loop of links": loop,
    "a device that never ends": link_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("what", WRONG)
def test_a_named_file_that_is_none(what: str, kind: str, call: Call) -> None:
    old, new, code = NAMED[kind]
    Path("m").mkdir()
    name = "m/config.json" if kind == "model" else "named"
    WRONG[what](Path(name))
    Path("s.yaml").write_text(small(old, new % ("m" if kind == "model" else "named")))
    answer = call("run", "s.yaml")
    assert (answer.code, answer.out) == (2, "")
    assert_one_error(answer.err, code, name, "why: ")


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("path", ['"a\\0b"', '""', '"' + "x" * 5000 + '"', '"\\e[31m"', "/dev/zero", "~"])
def test_odd_names_of_named_files(path: str, kind: str, call: Call) -> None:
    old, new, _ = NAMED[kind]
    Path("s.yaml").write_text(small(old, new % path))
    answer = call("run", "s.yaml")
    assert (answer.code, answer.out) == (2, "")
    assert_one_error(answer.err, "E0", "", "")
