"""Redaction of what names and shapes tell: secrets, machines, addresses and paths, in texts, JSON and SQLite alike."""

from __future__ import annotations

import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_eplb.core.errors import TraceError
from moe_eplb.recording.redact import redact
from moe_eplb.recording.redact_json import redact_json
from moe_eplb.recording.redact_names import names_someone, sensitive
from moe_eplb.recording.redact_text import REMOVED, Scrubber

PEM = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADAN\nBgkqhkiG\n-----END PRIVATE KEY-----"
ROOTLESS = ("/nobackup/dave", "/u/dave", "/cluster/home/bob/x", "/raid/erin", "/storage/erin", "/lustre01/erin")


def _document(value: Any, scrubber: Scrubber | None = None) -> Any:
    return json.loads(redact_json(json.dumps(value), scrubber or Scrubber())[0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("token=hf_AbCdEf1234567890 next", f"token={REMOVED} next"),
        ("password=hunter2", f"password={REMOVED}"),
        ("api_key: sk", f"api_key: {REMOVED}"),
        ("Authorization: Bearer abc.def", f"Authorization: {REMOVED}"),
        ("'password': 'hunter2 and more', 'x': 1", f"'password': '{REMOVED}', 'x': 1"),
        ('say {\\"hf_token\\": \\"abc def\\", \\"n\\": 1}', f'say {{\\"hf_token\\": \\"{REMOVED}\\", \\"n\\": 1}}'),
        ('{"password": "a\\"b", "n": 1', f'{{"password": "{REMOVED}", "n": 1'),
        ("--hf-token abc --flag", f"--hf-token {REMOVED} --flag"),
        ("['--hf-token', 'abc'] and", f"['--hf-token', {REMOVED} and"),
        ("/proc/self/cwd/x", REMOVED),
        ("--verbose --hf-token abc", f"--verbose --hf-token {REMOVED}"),
        ("--use-auth --hf-token abc", f"--use-auth --hf-token {REMOVED}"),
        ('["--use-auth", "--password", "abc"]', f'["--use-auth", "--password", {REMOVED}'),
        ("--use-auth --api-key=abc --n 3", f"--use-auth --api-key={REMOVED} --n 3"),
        ("clone https://ghp_ABCDEFGHIJ1234567890@github.com/corp", f"clone https://{REMOVED}@github.com/corp"),
        ("https://me:p@ss@host/x", f"https://{REMOVED}@host/x"),
        ("hf_AbCdEf1234567890, gho_abcdefgh12", f"{REMOVED}, {REMOVED}"),
        ("sk-live-11112222 AKIAIOSFODNN7EXAMPLE eyJabc.def.ghi", f"{REMOVED} {REMOVED} {REMOVED}"),
        (f"with {PEM} in it", f"with {REMOVED} in it"),
        (f"KEY={PEM}\nrest", f"KEY={REMOVED}\nrest"),
        (PEM[:40], REMOVED),
        ("10.0.0.1eyJa.b", REMOVED + REMOVED),
        ("fe80::1ff:fe23:4567:890a", REMOVED),
        ("[2001:db8::5]:29500", f"[{REMOVED}]:29500"),
        ("2001:db8::5:29500", f"{REMOVED}:29500"),
        ("fe80:0:0:0:b83f:d203:ab:cdef fe80::1%eth0", f"{REMOVED} {REMOVED}"),
        ("load file:///home/bob/x/model.bin", f"load file:{REMOVED}/model.bin"),
        ("file://host.of.ours/home/bob/x", f"file:{REMOVED}"),
        ("-I/work/a/include -L/scratch/a/lib", f"-I{REMOVED} -L{REMOVED}"),
        ("/data/users/alice.smith", REMOVED),
        ("/scratch/users/someone/x.py(3)", f"{REMOVED}/x.py(3)"),
        ("at C:\\Users\\carol\\proj\\train.py", f"at {REMOVED}/train.py"),
        ("at \\\\server\\share\\carol", f"at {REMOVED}"),
        ("~/proj/x and ~bob/proj", f"{REMOVED} and {REMOVED}"),
        ("/work/my\\ proj/x", REMOVED),
        *((path, REMOVED) for path in ROOTLESS),
    ],
)  # fmt: skip
def test_what_goes(text: str, expected: str) -> None:
    scrubber = Scrubber()
    assert scrubber.text(text) == expected
    assert scrubber.text(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "void at::native::vectorized_elementwise_kernel<(int)4, std::array<char *, (unsigned long)2>>(int, T2, T3)",
        "c10::add", "a::b", "x[::2]", "12:34:56", "wait_gpu/3", "jit(f)/jit(main)/dot_general", "layers[3]/attn/q",
        "torch/nn/modules/module.py(1518): _call_impl", "tokens=512", "num_tokens: 512", "tokens: [512, 3]", "key=3",
        "Tokenizer::encode", "hf_attention_forward", "task-parallel step", "a / b", "2026/11/29", "</div>", "author=me",
        "/usr/lib/x86_64-linux-gnu/libcuda.so.1", "/step", "node 3", "http://host/x",
    ],
)  # fmt: skip
def test_what_stays(text: str) -> None:
    assert Scrubber().text(text) == text


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN", "api_key", "apiKey", "WANDB_API_KEY", "password", "passwd", "Authorization", "auth", "cookie",
        "credentials", "client-secret", "bearer", "private_key", "access-key", "hosts", "hostnames", "nodename",
        "nodeName", "NODE", "fqdn", "cmd", "exe", "users", "paths",
    ],
)  # fmt: skip
def test_names_of_fields_that_must_not_keep_their_values(name: str) -> None:
    assert sensitive(name)


@pytest.mark.parametrize("name", ["tokens", "token", "max_tokens", "graph node id", "nodes", "hosts"])
def test_numbers_under_such_names_are_counts(name: str) -> None:
    assert not sensitive(name, number=True)
    assert _document({name: 5, "all": [{name: [1, 2.50]}]}) == {name: 5, "all": [{name: [1, 2.5]}]}


@pytest.mark.parametrize("name", ["author", "macs", "key", "process", "tokenizer", "keynote", "class"])
def test_names_that_only_look_like_them(name: str) -> None:
    assert not sensitive(name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hostName", True),
        ("nodename", True),
        ("EXPORT_USER", True),
        ("user", True),
        ("NODE", False),
        ("USER_ID", False),
    ],
)
def test_names_under_which_someone_stands(name: str, expected: bool) -> None:
    assert names_someone(name) == expected


def test_values_under_keys_go_and_a_pair_of_name_and_value_too() -> None:
    secrets = {
        name: f"plain-{name}" for name in ("HF_TOKEN", "api_key", "password", "Authorization", "cmd", "nodename")
    }
    redacted = _document([secrets, {"name": "HF_TOKEN", "value": "plain"}, {"name": "step", "value": "plain"}])
    assert redacted == [
        dict.fromkeys(secrets, REMOVED), {"name": "HF_TOKEN", "value": REMOVED}, {"name": "step", "value": "plain"}
    ]  # fmt: skip


def test_a_list_of_arguments_loses_what_an_option_announces() -> None:
    arguments = ["python", "train.py", "--hf-token", "plain", "--steps", "5"]
    assert _document({"launch": arguments}) == {"launch": [*arguments[:3], REMOVED, *arguments[4:]]}


def test_json_in_a_text_is_looked_into() -> None:
    inner = json.dumps({"env": {"A": "plain1", "B": "plain2"}, "password": "plain3", "hostname": "plain4", "n": 1.50})
    redacted = _document({"cfg": inner, "note": "{none", "other": ' {"n": 1.50} '})
    assert json.loads(redacted["cfg"]) == {"env": REMOVED, "password": REMOVED, "hostname": REMOVED, "n": 1.5}
    assert (redacted["note"], redacted["other"]) == ("{none", ' {"n": 1.50} ')


def test_a_machine_goes_by_its_short_name_and_in_any_case() -> None:
    document = {
        "hostname": "gpunode17.corp.example.com", "hosts": ["gpunode18", "gpunode19"],
        "note": "gpunode17, GPUNODE17 and GpuNode18-ib0 of corp.example.com; gpunode177",
        "user": "alice.smith", "b": "alice",
    }  # fmt: skip
    redacted = _document(document)
    assert redacted["note"] == f"{REMOVED}, {REMOVED} and {REMOVED}-ib0 of {REMOVED}; gpunode177"
    assert redacted["b"] == "alice"


def test_keys_are_scrubbed_and_none_takes_the_place_of_another() -> None:
    document = {
        "sources": {"/work/secretproj/user/file.py": 3, "/work/secretproj/a.py": [4]},
        "peers": {"10.0.0.1": {"a": 1}, "10.0.0.2": {"a": 2}, "10.0.0.3": {"/home/bob/secretproj/x": "/home/bob/x"}},
    }
    text, removed = redact_json(json.dumps(document), Scrubber())
    assert "secretproj" not in text + str(removed)
    assert json.loads(text) == {
        "sources": {f"{REMOVED}/file.py": REMOVED, f"{REMOVED}/a.py": [4]},
        "peers": {REMOVED: {"a": 1}, f"{REMOVED} 2": {"a": 2}, f"{REMOVED} 3": {REMOVED: REMOVED}},
    }
    assert redact_json(text, Scrubber()) == (text, [])


@pytest.mark.parametrize("place", ['"\\ue000number:HF_TOKEN=abc"', '{"\\ue000number:1": 2}', '["x \ue000number:"]'])
def test_a_document_cannot_pass_a_text_off_as_a_number(place: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(f'{{"a": {place}, "b": 1.50}}')
    with pytest.raises(TraceError, match="E068"):
        redact(path)


def test_a_secret_in_a_longer_value_does_not_keep_the_rest() -> None:
    scrubber = Scrubber(environment={"HF_TOKEN": "hf-localsecret"})
    assert scrubber.text("MY_KEYS=hf-localsecret,another") == f"MY_KEYS={REMOVED}"
    assert scrubber.text("--my-keys hf-localsecret,another") == f"--my-keys {REMOVED}"


def _database(path: Path) -> Path:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            """
            CREATE TABLE META_DATA_CAPTURE (name TEXT, value TEXT);
            CREATE TABLE SETTINGS (key TEXT, value TEXT);
            CREATE TABLE ANALYSIS_DETAILS (ip TEXT, cmd TEXT, osHost TEXT, note TEXT, api_key TEXT, nodeName TEXT);
            CREATE TABLE NVTX_EVENTS (start INTEGER, textId INTEGER, globalTid INTEGER, domainId INTEGER, jsonText, b);
            CREATE VIEW shown AS SELECT 'planted-view' AS x;
            INSERT INTO META_DATA_CAPTURE VALUES ('HF_TOKEN', 'planted-token'), ('NODE', 'planted-node'), ('A', '5');
            INSERT INTO SETTINGS VALUES ('wandb_api_key', 'planted-key');
            INSERT INTO ANALYSIS_DETAILS VALUES
                ('planted-ip', 'planted-cmd', 'planted9.corp', 'on PLANTED9', 'planted-key', 'planted-node');
            """
        )
        row = (1, None, 1, 0, '{"password":"planted-password","n":1}', "HF_TOKEN=planted-wide".encode("utf-16-le"))
        connection.execute("INSERT INTO NVTX_EVENTS VALUES (?, ?, ?, ?, ?, ?)", row)
        connection.commit()
    return path


def test_a_database_keeps_nothing_planted(tmp_path: Path) -> None:
    path = _database(tmp_path / "trace.sqlite")
    removed = redact(path)
    data = path.read_bytes().lower()
    assert (b"planted" in data, b"p\0l\0a\0n" in data, b"1" in data) == (False, False, True)
    assert "views: 1" in removed
    assert redact(path) == []


@pytest.mark.parametrize(
    "text",
    [
        "AAA=" + " " * 40_000 + "x", "-" * 40_000, "-token" * 8_000, "://a:" * 8_000, "eyJ-" * 10_000, "a_b-" * 9_000,
        "/a" * 9_000, "/" * 40_000, "~/" * 9_000, "fe80:" * 8_000, "token=" * 8_000, 'token="' * 8_000, "C:\\" * 9_000,
        "-----BEGIN A-----" * 4_000, "serial" * 8_000 + " " * 20_000, "hf_" * 15_000, "A" * 40_000,
        "key" + " " * 40_000, "ABC=x " * 8_000, "/home/" * 8_000, '\\"token\\": ' * 4_000, "1." * 9_000, "00:" * 9_000,
    ],
    ids=lambda text: text[:8],
)  # fmt: skip
def test_the_time_grows_with_the_length_of_a_text_alone(text: str) -> None:
    scrubber = Scrubber()
    start = time.perf_counter()
    scrubber.text(text)
    assert time.perf_counter() - start < 1.0


@given(st.lists(st.sampled_from([
    "token", "=", ":", " ", '"', "'", "\\", "hf_abcdef123", "--api-key", "/home/bob", "/", "x.py", "//", "@", "http://",
    "ABC=", "serial", "1", "10.0.0.1", "fe80::1", "(removed)", "\n", "-I", "~", "C:\\", "Bearer ", "eyJa.b", ";", ".",
    ")", "gpunode17", "password", "-----BEGIN A-----", "file:", "{", "[", "]", "}", ",",
]), max_size=12).map("".join))  # fmt: skip
def test_scrubbing_twice_is_scrubbing_once(text: str) -> None:
    scrubber = Scrubber(["/home/a"], ["gpunode17.corp.example"], {"A_KEY": "hf_abcdef123"})
    once = scrubber.text(text)
    assert scrubber.text(once) == once
