"""Redaction of paths with spaces, URLs, and settings in free text, wherever each may stand."""

from __future__ import annotations

import json
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_eplb.recording.redact import redact
from moe_eplb.recording.redact_paths import home_owners
from moe_eplb.recording.redact_run import copy_run
from moe_eplb.recording.redact_text import REMOVED, Scrubber
from tests.support.planted import plant_export

GOOD = Path(__file__).parents[2] / "traces" / "good" / "two_ranks_gathered"

GOES = [
    ("/home/bob smith/run 1/x.py", f"{REMOVED}/x.py"),
    ("python /home/bob smith/run 1/x.py --steps 5", f"python {REMOVED}/x.py --steps 5"),
    ("/home/bob smith", REMOVED),
    ("/home/bob smith: no such file", f"{REMOVED}: no such file"),
    ("at /Users/bob/Dropbox (Secret Corp)/my run/x.py(3): forward", f"at {REMOVED}/x.py(3): forward"),
    ("cp '/home/bob/Bob's Mac/a b.txt' /usr/lib/x", f"cp '{REMOVED}' /usr/lib/x"),
    ("/data/a b:/data/c d/e", f"{REMOVED}:{REMOVED}"),
    ("-I/work/a b/include -L/scratch/a/lib --out=/home/x y", f"-I{REMOVED} -L{REMOVED} --out={REMOVED}"),
    ("C:\\Users\\carol smith\\run 1\\x.py", f"{REMOVED}/x.py"),
    ("/home/a b C:\\x y\\z", f"{REMOVED} {REMOVED}"),
    ("//server7/share x/y", REMOVED),
    ("~/my proj/x y", REMOVED),
    ("https://build7.corp.example/x", f"https://{REMOVED}"),
    ("http://host/x", f"http://{REMOVED}"),
    ("(see https://build7/x).", f"(see https://{REMOVED})."),
    ('{"url": "tcp://node17:29500", "n": 1', f'{{"url": "tcp://{REMOVED}", "n": 1'),
    ("https:\\/\\/build7.corp\\/x", f"https:\\/\\/{REMOVED}"),
    ("postgres://user:p w@db3/x?a=b", f"postgres://{REMOVED} {REMOVED}"),
    ("ssh bob@node17:/x", f"ssh {REMOVED}"),
    ("git@git.corp.example:secret/x.git", REMOVED),
    ("user=bob", f"user={REMOVED}"),
    ("USER: bob", f"USER: {REMOVED}"),
    ("login=bob rank=3", f"login={REMOVED} rank=3"),
    ("user: Bob Smith, step 3", f"user: {REMOVED}, step 3"),
    ("User name: bob", f"User name: {REMOVED}"),
    ("user='bob smith' rank=3", f"user='{REMOVED}' rank=3"),
    ("password=correct horse\nnext", f"password={REMOVED}\nnext"),
    ("db_user = bob", f"db_user = {REMOVED}"),
    ("host=node17, hostname: node18", f"host={REMOVED}, hostname: {REMOVED}"),
    ("--user = bob --api-key: x", f"--user = {REMOVED} --api-key: {REMOVED}"),
    ("--user bob --host db3 -x", f"--user {REMOVED} --host {REMOVED} -x"),
    ("user=104211", f"user={REMOVED}"),
    ("uid=1000(bob)", f"uid={REMOVED}"),
]  # fmt: skip
STAYS = [
    "hosts=4", "user=3", "user_annotation: step", "cudaHostAlloc: 5", "operator@", "@torch.jit.script", "a :// b",
    "users::add", "host==3", "2nd pass: forward", "superstep: x", "/usr/lib/my lib/x.so", "route /3 of",
    "memcpy@@GLIBC_2.2",
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), GOES)
def test_what_goes(text: str, expected: str) -> None:
    scrubber = Scrubber()
    assert scrubber.text(text) == expected
    assert scrubber.text(expected) == expected


@pytest.mark.parametrize("text", STAYS)
def test_what_stays(text: str) -> None:
    assert Scrubber().text(text) == text


SECRETS = {
    "path": ("python /home/bob/qqsecret one/qqsecret run 1/x.py", ["qqsecret"]),
    "url": (
        "connect to postgres://qqlogin:qqpass@qqdb3.corp.example/qqtable",
        ["qqlogin", "qqpass", "qqdb3", "qqtable"],
    ),
    "store": ("tcp://qqnode17:29500", ["qqnode17"]),
    "user": ("logged in, user=qqalice", ["qqalice"]),
    "USER": ("USER: qqalice", ["qqalice"]),
    "login": ("login=qqalice; then", ["qqalice"]),
    "password": ("password=qqcorrect qqhorse", ["qqcorrect", "qqhorse"]),
    "token": ("token: qqtoken", ["qqtoken"]),
}
"""A text for each, and what of it must be nowhere in a redacted file."""


def _left(data: bytes, secrets: list[str]) -> list[str]:
    return [secret for secret in secrets if secret.encode() in data or secret.encode("utf-16-le") in data]


@pytest.mark.parametrize("encoding", ["UTF-8", "UTF-16le"])
@pytest.mark.parametrize("name", SECRETS)
def test_no_text_column_keeps_it(name: str, encoding: str, tmp_path: Path) -> None:
    text, secrets = SECRETS[name]
    path = tmp_path / "nsys.sqlite"
    plant_export(path, text, encoding)
    assert _left(path.read_bytes(), secrets) == secrets
    removed = redact(path)
    assert _left(path.read_bytes() + str(removed).encode(), secrets) == []
    with closing(sqlite3.connect(path)) as connection:
        ranges = connection.execute("SELECT start, text FROM NVTX_EVENTS WHERE domainId = 1 ORDER BY start")
        assert ranges.fetchall() == [(0, "moe_eplb"), (3, "route/3")]
    assert redact(path) == []


def _document(text: str) -> dict[str, object]:
    return {
        "note": text,
        text: 1,
        "inner": json.dumps({"list": [text], text: text}),
        "broken": '{"a": ' + json.dumps(text),
        "traceEvents": [
            {"ph": "X", "cat": "cpu_op", "name": text, "ts": 5, "args": {"Input": [text], text: text}},
            {"ph": "X", "cat": "kernel", "name": "k", "ts": 5, "args": {"text": text}},
            {"ph": "X", "cat": "user_annotation", "name": "route/3", "ts": 5, "args": {"domain": "moe_eplb"}},
            {"ph": "M", "name": "thread_name", "args": {"name": text}},
        ],
    }


@pytest.mark.parametrize("name", SECRETS)
def test_neither_strings_nor_keys_of_json_keep_it(name: str, tmp_path: Path) -> None:
    text, secrets = SECRETS[name]
    path = tmp_path / "kineto.json"
    path.write_text(json.dumps(_document(text)))
    removed = redact(path)
    assert _left(path.read_bytes() + str(removed).encode(), secrets) == []
    events = json.loads(path.read_text())["traceEvents"]
    assert [event["name"] for event in events[1:3]] == ["k", "route/3"]
    assert redact(path) == []


@pytest.mark.parametrize("name", SECRETS)
def test_no_redacted_file_of_a_run_folder_keeps_it(name: str, tmp_path: Path) -> None:
    text, secrets = SECRETS[name]
    run = shutil.copytree(GOOD, tmp_path / "run")
    for file in ("meta.json", "verdict.json"):
        (run / file).write_text(json.dumps(json.loads((run / file).read_text()) | {"note": text, text: [text]}))
    (run / "kineto.rank0.json").write_text(json.dumps(_document(text)))
    plant_export(run / "nsys.sqlite", text)
    evidence = run / "evidence.rank0.jsonl"
    rows = evidence.read_text().replace('"off":""', f'"off":{json.dumps(text)}')
    evidence.write_text(rows + '{"row":"call","what":' + json.dumps(text))
    copy_run(run, tmp_path / "public")
    data = b"".join(path.read_bytes() for path in (tmp_path / "public").iterdir())
    assert len(_left(b"".join(path.read_bytes() for path in run.iterdir()), secrets)) == len(secrets)
    assert _left(data, secrets) == []


def test_whom_one_text_tells_of_goes_from_the_others() -> None:
    scrubber = Scrubber()
    texts = (
        "tcp://gpunode17.corp.example:29500", "user=wilhelmine", "ssh x@lab-5", "/Users/erika mustermann/x.py",
        "tcp://balancer:80", "postgres://friedrich:pw@db/x",
    )  # fmt: skip
    for text in texts:
        scrubber.learn_from(text)
    told = "gpunode17, wilhelmine, lab-5, erika mustermann, friedrich"
    assert scrubber.text(told) == ", ".join([REMOVED] * 5)
    assert scrubber.text("stream balancer") == "stream balancer"


def test_owners_of_home_folders_with_spaces() -> None:
    assert home_owners("/home/bob/x and /Users/ann lee/y and /home/eve is") == ["bob", "ann lee", "eve", "ann"]


# -- properties ------------------------------------------------------------------------------------------------------

WORD = st.text("qxzj", min_size=3, max_size=6)
"""Of letters that no text around them holds, so that a secret is found by them."""
NAME = st.lists(WORD, min_size=1, max_size=3).map(" ".join)
BEFORE = st.sampled_from(["", "open ", "'", "a=", "(", "load: ", "-I", "\n", '"'])
ROOT = st.sampled_from(["/home/", "/work/", "/opt/a/", "~/", "C:\\", "/Users/", "/nobackup/a/"])


@given(
    BEFORE, ROOT, st.lists(NAME, min_size=1, max_size=4), st.sampled_from(["", "/x.py", "/x.py(3): f", "\nnext", "/"])
)
def test_no_part_of_a_path_with_spaces_stays(before: str, root: str, parts: list[str], after: str) -> None:
    slash = root[-1]
    text = before + root + slash.join(parts) + after.replace("/", slash)
    scrubbed = Scrubber().text(text)
    assert not set("qxzj") & set(scrubbed.replace("x.py", "").replace("next", ""))
    assert Scrubber().text(scrubbed) == scrubbed


PLAIN = st.one_of(st.text("qxzj!$%&*+,.-=_~:@?#()[]" + mark, min_size=1, max_size=8) for mark in "/'").map(
    lambda text: f"q{text}z"
)
"""A slash or a quote: only with both is it open where a URL ends."""
SCHEME = st.sampled_from(["https", "tcp", "postgres", "s3", "HTTP", "git+ssh"])


@given(BEFORE, SCHEME, PLAIN, WORD, st.sampled_from(["", ":29500", "/a b", "/", "?a=1"]))
def test_of_a_url_its_scheme_alone_stays(before: str, scheme: str, login: str, host: str, after: str) -> None:
    scrubbed = Scrubber().text(f"{before}{scheme}://{login}@{host}{after}")
    assert not set("qxzj") & set(scrubbed)


@given(
    BEFORE.filter(lambda before: before != "-I"),  # which would be a part of the word
    st.sampled_from(["user", "USER", "login", "username", "user_name", "password", "db-user", "token", "Passphrase"]),
    st.sampled_from(["=", ": ", ":", " = ", " : ", '": "', "': '", '\\": \\"']),
    WORD,
)
def test_no_value_of_a_setting_that_names_someone_stays(before: str, name: str, sign: str, value: str) -> None:
    quote = sign[0] if sign[0] in "\"'" else '\\"' if sign[0] == "\\" else ""
    scrubbed = Scrubber().text(f"{before}{quote}{name}{sign}{value}{quote} step")
    assert not set("qxzj") & set(scrubbed)


@pytest.mark.parametrize(
    "text",
    [
        "/home/a b" * 6_000, "/home/a " + "b " * 20_000, "/home/a b --x " * 4_000, " (" * 20_000, "/a (" * 10_000,
        "://" * 12_000, "a@" * 20_000, "user=" * 8_000, "user: a " * 5_000, "a-" * 20_000, "/home/" + "a'" * 18_000,
        "C:\\a b" * 6_000, "user name" * 4_000, "://a:" * 8_000, "x@y" * 12_000, "user" + " " * 40_000,
        "/home/a b=" * 4_000,
    ],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_the_time_grows_with_the_length_of_a_text_alone(text: str) -> None:
    scrubber = Scrubber()
    start = time.perf_counter()
    scrubber.learn_from(text)
    scrubber.text(text)
    assert time.perf_counter() - start < 1.5
