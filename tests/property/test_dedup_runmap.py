"""RunMap against a plain dict, by random operations."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup.ids import Ids, TaskId
from dedup.runmap import RunMap

RUNS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 15)), max_size=3).map(tuple)
KEYS = st.lists(st.integers(0, 6).map(lambda n: bytes([n]) * 16), max_size=4).map(tuple)
BATCHES = st.builds(Ids, RUNS, KEYS)
STEPS = st.lists(
    st.tuples(st.sampled_from(["set", "set", "remove"]), BATCHES, st.integers(0, 2)), max_size=25
)
EVERYTHING = Ids(((1, 60),), tuple(bytes([n]) * 16 for n in range(8)))


def check(steps: list[tuple[str, Ids, int]]) -> None:
    """Do ``steps`` to a RunMap and to a dict, and compare all that can be read."""
    ids: RunMap[int] = RunMap()
    model: dict[TaskId, int] = {}
    for step, batch, value in steps:
        if step == "set":
            ids.set(batch, value)
            model.update((task_id, value) for task_id in batch)
        else:
            gone = {task_id for task_id in batch if model.pop(task_id, None) is not None}
            assert ids.remove(batch) == len(gone)
        spans = ids.spans(batch)
        assert [v for count, v in spans for _ in range(count)] == [model.get(task_id) for task_id in batch]
        assert all(left[1] != right[1] for left, right in pairwise(spans))
    assert [v for count, v in ids.spans(EVERYTHING) for _ in range(count)] == list(map(model.get, EVERYTHING))
    assert [ids.get(task_id) for task_id in EVERYTHING] == list(map(model.get, EVERYTHING))
    assert len(ids) == len(model)
    items = list(ids.items())
    assert {task_id: value for batch, value in items for task_id in batch} == model
    afresh: RunMap[int] = RunMap()
    for task_id in sorted(model, key=lambda each: (isinstance(each, bytes), each)):
        afresh.set(
            Ids((), (task_id,)) if isinstance(task_id, bytes) else Ids(((task_id, 1),)), model[task_id]
        )
    assert items == list(afresh.items())


@settings(deadline=None, max_examples=300)
@given(STEPS)
def test_a_run_map_is_a_dict_with_one_canonical_form(steps: list[tuple[str, Ids, int]]) -> None:
    check(steps)


def test_a_run_map_that_forgets_to_keep_what_is_right_of_a_write_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = RunMap._splice

    def without_the_rest(
        self: RunMap[int], low: int, high: int, starts: list[int], ends: list[int], values: list[int]
    ) -> None:
        whole(self, low, high, starts[:2], ends[:2], values[:2])

    monkeypatch.setattr(RunMap, "_splice", without_the_rest)

    @settings(deadline=None, max_examples=300, database=None, derandomize=True, report_multiple_bugs=False)
    @given(STEPS)
    def try_all(steps: list[tuple[str, Ids, int]]) -> None:
        check(steps)

    with pytest.raises(AssertionError):
        try_all()
