"""RunMap: neighbours of one value are one entry."""

from __future__ import annotations

from dedup.ids import Ids
from dedup.runmap import RunMap

K1, K2, K3 = (bytes([n]) * 16 for n in (1, 2, 3))


def run(start: int, count: int) -> Ids:
    return Ids(((start, count),))


def test_neighbours_of_one_value_are_one_run_whichever_came_first() -> None:
    for order in ([1, 11, 21], [21, 11, 1], [1, 21, 11]):
        ids: RunMap[str] = RunMap()
        for start in order:
            ids.set(run(start, 10), "a")
        assert list(ids.items()) == [(run(1, 30), "a")]
        assert (len(ids), ids.runs) == (30, 1)


def test_setting_the_middle_of_a_run_cuts_it_in_three() -> None:
    ids: RunMap[str] = RunMap()
    ids.set(run(1, 30), "a")
    ids.set(run(11, 10), "b")
    assert list(ids.items()) == [(run(1, 10), "a"), (run(11, 10), "b"), (run(21, 10), "a")]
    assert ids.spans(run(9, 30)) == [(2, "a"), (10, "b"), (10, "a"), (8, None)]


def test_removing_the_middle_of_a_run_leaves_both_ends() -> None:
    ids: RunMap[str] = RunMap()
    ids.set(run(1, 30), "a")
    assert ids.remove(Ids(((11, 10), (15, 3)))) == 10
    assert list(ids.items()) == [(run(1, 10), "a"), (run(21, 10), "a")]
    assert (ids.get(10), ids.get(11), ids.get(20), ids.get(21), ids.get(31)) == ("a", None, None, "a", None)


def test_spans_follow_the_order_of_the_batch_and_merge_across_runs_and_keys() -> None:
    ids: RunMap[int] = RunMap()
    ids.set(Ids(((1, 5),), (K2,)), 7)
    assert ids.spans(Ids(((3, 3), (1, 2)), (K2, K1))) == [(6, 7), (1, None)]
    assert ids.spans(Ids()) == []


def test_keys_come_in_ascending_order_and_in_groups_of_one_value() -> None:
    ids: RunMap[int] = RunMap()
    ids.set(Ids((), (K3, K1)), 1)
    ids.set(Ids(((9, 1),), (K2,)), 2)
    assert list(ids.items()) == [
        (run(9, 1), 2),
        (Ids((), (K1,)), 1),
        (Ids((), (K2,)), 2),
        (Ids((), (K3,)), 1),
    ]
    ids.set(Ids((), (K2,)), 1)
    assert list(ids.items()) == [(run(9, 1), 2), (Ids((), (K1, K2, K3)), 1)]
    assert (ids.get(K2), ids.get(bytes(16)), len(ids)) == (1, None, 4)


def test_equal_values_that_are_different_objects_are_one_run() -> None:
    ids: RunMap[list[int]] = RunMap()
    ids.set(run(1, 1), [1, 2])
    ids.set(run(2, 1), [1, 2])
    assert ids.runs == 1


def test_a_false_value_is_a_value() -> None:
    ids: RunMap[int] = RunMap()
    ids.set(Ids(((1, 1),), (K1,)), 0)
    assert ids.spans(Ids(((1, 1),), (K1,))) == [(2, 0)]
    assert [value for _, value in ids.items()] == [0, 0]
