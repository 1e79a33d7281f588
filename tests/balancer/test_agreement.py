"""Five summed integers tell exactly whether all ranks have the same plan ready."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from moe_eplb.balancer.agreement import lanes, outcome, plan_digest

DIGEST = st.one_of(st.none(), st.integers(0, 2**40 - 1), st.integers(0, 3))


@settings(max_examples=300, deadline=None)
@given(st.lists(DIGEST, min_size=1, max_size=64))
def test_against_looking_at_every_vote(votes: list[int | None]) -> None:
    result = outcome(sum((lanes(vote) for vote in votes[1:]), lanes(votes[0])))
    ready = [vote for vote in votes if vote is not None]
    assert result.ready == len(ready)
    assert result.digests_differ == (len(set(ready)) > 1)


def test_squares_of_4096_ranks_fit_int64() -> None:
    result = outcome(lanes(2**40 - 1) * 4096)
    assert result.ready == 4096
    assert not result.digests_differ


def test_layer_and_iteration_are_part_of_the_digest() -> None:
    digests = {plan_digest(0, 1, 5), plan_digest(1, 1, 5), plan_digest(0, 2, 5), plan_digest(0, 1, 6)}
    assert len(digests) == 4
    assert all(0 <= d < 2**40 for d in digests)
