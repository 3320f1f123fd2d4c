"""Ids: their text form, their batches, and the keys that name them."""

from __future__ import annotations

import pytest

from dedup.ids import KEY_BYTES, RANGE_ID_MAX, Ids, id_text, ids_of, keyed_id, parse_id

KEY = bytes(range(16))


@pytest.mark.parametrize("task_id", [1, 65_536, RANGE_ID_MAX, KEY, bytes(16), b"\xff" * 16])
def test_text_names_the_id_it_came_from(task_id: int | bytes) -> None:
    assert parse_id(id_text(task_id)) == task_id


@pytest.mark.parametrize(
    "text",
    ["", "0", "-1", "+1", " 1", "1.0", str(RANGE_ID_MAX + 1), "k", "k" + "0" * 31, "k" + "g" * 32, "²", "١"],
)
def test_text_that_names_no_id_is_refused_with_the_text_in_the_message(text: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        parse_id(text)


def test_a_batch_is_ordered_by_runs_and_then_keys() -> None:
    ids = Ids(((5, 2), (1, 3)), (KEY,))
    assert list(ids) == [5, 6, 1, 2, 3, KEY]
    assert len(ids) == 6


def test_every_part_of_a_batch_is_the_same_slice_of_its_order() -> None:
    ids = Ids(((5, 2), (1, 3), (9, 1)), (KEY, bytes(16)))
    whole = list(ids)
    for at in range(len(whole) + 1):
        for count in range(len(whole) - at + 1):
            assert list(ids.part(at, count)) == whole[at : at + count]


def test_neighbours_are_gathered_into_runs() -> None:
    assert ids_of([7, 8, 9, 11, KEY, 12, 5]) == Ids(((7, 3), (11, 2), (5, 1)), (KEY,))
    assert ids_of(()) == Ids()


def test_a_keyed_id_is_stable_across_versions() -> None:
    assert keyed_id("default", "order-1").hex() == "7555fb9c9140d5c3cf67dbde9d9e6e93"
    assert len(keyed_id("", "")) == KEY_BYTES


def test_queue_and_key_do_not_run_into_each_other() -> None:
    assert len({keyed_id("ab", "c"), keyed_id("a", "bc"), keyed_id("abc", ""), keyed_id("", "abc")}) == 4
