from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_eplb.core import yaml_source
from moe_eplb.core.errors import ScenarioError

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 8)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True), ("False", False), ("on", "on"), ("yes", "yes"), ("NO", "NO"), ("~", None), ("null", None),
        ("12", 12), ("-3", -3), ("0o17", 15), ("0x1F", 31), ("017", 17), ("1_000", "1_000"), ("1:30", "1:30"),
        ("1e3", 1000.0), (".5", 0.5), ("-1.5E-2", -0.015), ("-.inf", float("-inf")), ("2024-01-01", "2024-01-01"),
        ("'12'", "12"), ("!!str 12", "12"), ("<<", "<<"), ("=", "="),
    ],
)  # fmt: skip
def test_scalars_follow_the_core_schema(text: str, value: object) -> None:
    read = yaml_source.load(f"key: {text}", "f").data["key"]
    assert read == value
    assert type(read) is type(value)


def test_places_are_those_of_keys_and_values() -> None:
    document = yaml_source.load("a:\n  - 1\n  - b: {c: 2}\n", "f.yaml")
    assert document.where(("a", 1, "b", "c")) == "f.yaml:3:12"
    assert document.where(("a", 1, "b", "c"), key=True) == "f.yaml:3:9"


def test_a_place_that_the_file_lacks_is_that_of_what_should_hold_it() -> None:
    document = yaml_source.load("a:\n  b: 1\n", "f.yaml")
    assert document.where(("a", "missing")) == document.where(("a",)) == "f.yaml:2:3"
    assert document.where(("a", "union tag", "b")) == "f.yaml:2:6"


@pytest.mark.parametrize(
    ("text", "code", "where"),
    [
        ("a: 1\nb:\n\t- 2\n", "E021", "f:3:1"),
        ("a: [1, 2\n", "E021", "f:2:1"),
        ("a: 1\n---\nb: 2\n", "E021", "f:2:1"),
        ("a: *nobody\n", "E021", "f:1:4"),
        ("a: b\x00c\n", "E021", "f:1:5"),
        ("a: 1\nb: 2\na: 3\n", "E022", "f:3:1"),
        ("a: {b: 1, b: 2}\n", "E022", "f:1:11"),
        ("x: " + "[" * 100 + "]" * 100, "E023", "f:1:35"),
        ("a: &a [*a]\n", "E023", "f:1:4"),
        (LAUGHS, "E023", "f:1:37"),
        ("a: !!python/object/apply:os.getcwd []\n", "E024", "f:1:4"),
        ("a: !!timestamp 2024-01-01\n", "E024", "f:1:4"),
        ("a: !!int x\n", "E024", "f:1:4"),
        ("? [1, 2]\n: 3\n", "E024", "f:1:3"),
        ("1.5: 3\n", "E024", "f:1:1"),
        ("true: 3\n", "E024", "f:1:1"),
        ("a: " + "9" * 5000, "E024", "f:1:4"),
        ("# nothing\n", "E025", "f"),
    ],
)
def test_bad_text_is_refused_with_its_place(text: str, code: str, where: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        yaml_source.load(text, "f")
    assert (caught.value.code, caught.value.where) == (code, where)


def test_a_tab_gets_a_hint() -> None:
    with pytest.raises(ScenarioError, match="indent with spaces"):
        yaml_source.load("a:\n\t- 2\n", "f")


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00", b"a" * (yaml_source.MAX_BYTES + 1)])
def test_unreadable_files_are_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "f.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ScenarioError) as caught:
        yaml_source.read_text(path)
    assert (caught.value.code, caught.value.where) == ("E020", str(path))


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12) | st.sampled_from(
    ["on", "1e3", "0o7", "null", "", "=", "~", ".inf", "- x", "a: b", "'", "#"]
)
SCALARS = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | TEXT
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(TEXT, v, max_size=4), max_leaves=12)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(TEXT | st.integers(0, 99), VALUES, min_size=1, max_size=5))
def test_what_is_dumped_loads_back_equal(data: dict[str | int, object]) -> None:
    assert yaml_source.load(yaml_source.dump(data), "f").data == data


@settings(max_examples=60, deadline=None)
@given(st.text("[]{}:,-&*!?|> \n\t'\"#ab1.", max_size=40))
def test_no_text_leads_to_anything_but_data_or_a_scenario_error(text: str) -> None:
    try:
        document = yaml_source.load(text, "f")
    except ScenarioError:
        return
    assert document.where(()).startswith("f:")


SHIPPED = sorted((Path(__file__).resolve().parents[2] / "moe_eplb").rglob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_files_of_the_package_read_the_same_fast_and_slow(path: Path) -> None:
    text = path.read_text()
    assert yaml_source.load_shipped(text, path.name).data == yaml_source.load(text, path.name).data
