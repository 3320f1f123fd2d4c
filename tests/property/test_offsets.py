"""The position of a partition against the plainest model there is: a set of settled offsets."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from node.offsets import Offsets

RUNS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=40)


def model_position(start: int, settled: set[int]) -> int:
    while start in settled:
        start += 1
    return start


@given(st.integers(0, 20), RUNS)
def test_the_position_is_the_lowest_unsettled_offset_in_any_order_of_settling(
    start: int, runs: list[tuple[int, int]]
) -> None:
    offsets, settled = Offsets(start), set(range(start))
    for at, count in runs:
        before = offsets.position
        moved = offsets.settle(at, count)
        settled |= set(range(at, at + count))
        assert offsets.position == model_position(start, settled)
        assert moved == (offsets.position > before)
        assert offsets.settled_above == len([offset for offset in settled if offset > offsets.position])


def test_settling_by_runs_keeps_one_interval_a_gap() -> None:
    offsets = Offsets(0)
    for at in range(1, 10_000):
        offsets.settle(at, 1)
    assert (offsets.position, offsets.gaps, offsets.settled_above) == (0, 1, 9_999)
    assert offsets.settle(0, 1)
    assert (offsets.position, offsets.gaps) == (10_000, 0)
