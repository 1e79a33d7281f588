from __future__ import annotations

from pathlib import Path

import pytest

from moe_eplb.core import config
from moe_eplb.core.config import LoadBalancerConfig
from moe_eplb.core.errors import ScenarioError

FILE = """\
num_slots: 6
layer_updates_per_iter: 2
ep_size: 2
initial_global_assignments:
  3: [0, 1, 2, 3, 0, 1]
  4: [3, 2, 1, 0, 3, 2]
"""


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "eplb.yaml").write_text(FILE)
    assert config.load(tmp_path / "eplb.yaml") == LoadBalancerConfig(
        num_slots=6, layer_updates_per_iter=2, ep_size=2,
        initial_global_assignments={3: [0, 1, 2, 3, 0, 1], 4: [3, 2, 1, 0, 3, 2]},
    )  # fmt: skip


AS_WRITTEN = """\
initial_global_assignments:
  3: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20,
    21, 22, 23, 0, 1]
  10: [23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3,
    2, 1, 0, 0, 1]
layer_updates_per_iter: 0
num_slots: 26
"""


def test_a_generated_file_with_wrapped_inline_lists_and_sorted_keys_is_read() -> None:
    read = config.loads(AS_WRITTEN, "f")
    assert (read.num_slots, read.layer_updates_per_iter, read.ep_size) == (26, 0, None)
    assert read.initial_global_assignments == {3: [*range(24), 0, 1], 10: [*reversed(range(24)), 0, 1]}


def test_only_the_slots_must_be_given() -> None:
    read = config.loads("num_slots: 288\n", "f")
    assert (read.layer_updates_per_iter, read.initial_global_assignments, read.ep_size) == (0, None, None)


@pytest.mark.parametrize(
    ("text", "code", "where", "words"),
    [
        ("num_slots: 6\nlayer_update_per_iter: 1\n", "E031", "f.yaml:2:1", "layer_update_per_iter"),
        ("num_slots: 6\ndecay: 0.9\n", "E031", "f.yaml:2:1", "the keys are num_slots"),
        ("layer_updates_per_iter: 1\n", "E031", "f.yaml", "num_slots"),
        ("num_slots: '6'\n", "E031", "f.yaml:1:12", "num_slots"),
        ("num_slots: 0\n", "E031", "f.yaml:1:12", "num_slots"),
        ("num_slots: 6\nlayer_updates_per_iter: true\n", "E031", "f.yaml:2:25", "layer_updates_per_iter"),
        ("num_slots: 6\nlayer_updates_per_iter: -1\n", "E031", "f.yaml:2:25", "layer_updates_per_iter"),
        ("num_slots: 6\nep_size: 0\n", "E031", "f.yaml:2:10", "ep_size"),
        ("num_slots: 2\ninitial_global_assignments:\n  a: [0, 1]\n", "E031", "f.yaml:3", "initial_global_assignments"),
        ("num_slots: 2\ninitial_global_assignments:\n  0: [0, x]\n", "E031", "f.yaml:3:10", "initial_global"),
        ("num_slots: 3\ninitial_global_assignments:\n  0: [0, 1]\n", "E032", "f.yaml:3:6", "2 slots, not 3"),
        ("num_slots: 3\ninitial_global_assignments:\n  0: []\n", "E032", "f.yaml:3:6", "0 slots, not 3"),
        ("num_slots: 3\ninitial_global_assignments:\n  0: [0, 2, 3]\n", "E032", "f.yaml:3:6", "leaves experts out"),
        ("num_slots: 3\ninitial_global_assignments:\n  7: [0, 1, -1]\n", "E032", "f.yaml:3:6", "layer 7"),
        ("num_slots: 6\nnum_slots: 8\n", "E022", "f.yaml:2:1", "twice"),
        ("- num_slots: 6\n", "E031", "f.yaml", "mapping"),
        ("", "E025", "f.yaml", "empty"),
        ("num_slots:\t\t[6\n", "E021", "f.yaml:", "YAML"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_place(text: str, code: str, where: str, words: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        config.loads(text, "f.yaml")
    error = caught.value
    assert error.code == code
    assert error.where.startswith(where)
    assert words in str(error)


def test_a_misspelt_key_is_put_right() -> None:
    with pytest.raises(ScenarioError, match="did you mean 'layer_updates_per_iter'"):
        config.loads("num_slots: 6\nlayer_update_per_iter: 1\n", "f.yaml")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError) as caught:
        config.load(tmp_path / "nowhere.yaml")
    assert (caught.value.code, caught.value.where) == ("E020", str(tmp_path / "nowhere.yaml"))
