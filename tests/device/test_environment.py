"""What a rank's process asks CUDA and NCCL for, and whose word goes first."""

from __future__ import annotations

import os

import pytest

from moe_eplb.device.environment import CONNECTIONS, GRAPH_MIXING, prepare_process

VARIABLES = (CONNECTIONS, GRAPH_MIXING, "LOCAL_WORLD_SIZE", "WORLD_SIZE")


@pytest.fixture(autouse=True)
def _nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that what a test leaves is taken back
        monkeypatch.delenv(name)


@pytest.mark.parametrize("torchrun", [{}, {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}])
def test_ranks_on_one_machine_have_queues_enough_and_graphs_without_nodes_of_nccl(
    torchrun: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    prepare_process()
    assert (os.environ[CONNECTIONS], os.environ[GRAPH_MIXING]) == ("32", "0")


def test_ranks_on_several_machines_keep_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    prepare_process()
    assert GRAPH_MIXING not in os.environ
    assert os.environ[CONNECTIONS] == "32"


@pytest.mark.parametrize(("name", "value"), [(CONNECTIONS, "8"), (GRAPH_MIXING, "1")])
def test_what_the_user_has_set_stays(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    prepare_process()
    assert os.environ[name] == value
