"""Rows of delayed tasks, near and far, against a sorted list: whatever the clock says and whenever upkeep comes."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from oncekeeper.log import delay_rows
from oncekeeper.log.delay_rows import SHIFT, SPAN_SHIFT, Row
from oncekeeper.log.delayed import Place

SPAN_MS = 1 << SPAN_SHIFT
PARTITIONS, OFFSETS = 2, 40
EVER_MS = 100 * SPAN_MS

partitions = st.integers(0, PARTITIONS - 1)
offsets = st.integers(0, OFFSETS - 1)
counts = st.integers(1, 6)
# Due times meet one another, the edges of spans, and both sides of what is near.
times = st.builds(
    lambda span, at: span * SPAN_MS + at,
    st.integers(0, 8),
    st.sampled_from([0, 1, SPAN_MS // 2, SPAN_MS - 1]),
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("defer"), partitions, offsets, counts, times),
        st.tuples(st.just("move"), partitions, offsets, counts, times),
        st.tuples(st.just("drop"), partitions, offsets, counts),
        st.tuples(st.just("clock"), times),
        st.tuples(st.just("draw"), partitions),
        st.tuples(st.just("page"), partitions, times, st.integers(1, 5)),
    ),
    max_size=40,
)


class Table:
    def __init__(self) -> None:
        self.database = sqlite3.connect(":memory:", isolation_level=None)
        self.database.executescript(delay_rows.SCHEMA)
        self.now_ms = 0

    def ask(self, statement: str, values: Any) -> list[tuple[Any, ...]]:
        return self.database.execute(statement, values).fetchall()

    def page(self, partition: int, after: tuple[int, int], until_ms: int, limit: int) -> list[Any]:
        return delay_rows.due(self.ask, partition, after, until_ms, limit)

    def all(self, partition: int, limit: int) -> Iterator[tuple[int, int]]:
        """(due_ms, offset) of each task, page by page."""
        after = (-1, partition << SHIFT)
        while page := self.page(partition, after, EVER_MS, limit):
            assert len(page) <= limit
            for due_ms, place, count, _ in page:
                yield from ((due_ms, (place & delay_rows.OFFSETS) + at) for at in range(count))
            after = page[-1][:2]


@contextmanager
def table() -> Iterator[Table]:
    made = Table()
    try:
        yield made
    finally:
        made.database.close()


def pieces(waiting: dict[tuple[int, int], int], partition: int) -> list[tuple[int, int]]:
    return sorted((due_ms, offset) for (of, offset), due_ms in waiting.items() if of == partition)


@settings(max_examples=300, deadline=None)
@given(steps, st.integers(1, 7))
def test_what_is_due_is_found_in_order_wherever_it_lies(todo: list[Any], limit: int) -> None:
    waiting: dict[tuple[int, int], int] = {}
    with table() as made:
        database = made.database
        for kind, *rest in todo:
            match kind, rest:
                case "defer", (partition, offset, count, due_ms):
                    row: Row = (partition << SHIFT | offset, count, partition, due_ms, 0)
                    delay_rows.insert(database, delay_rows.not_standing(database, [row]), made.now_ms)
                    for at in range(offset, offset + count):
                        waiting.setdefault((partition, at), due_ms)
                case (("move" | "drop"), (partition, offset, count, *due)):
                    taken = delay_rows.carve(database, [Place(partition, offset, count)], made.now_ms)
                    if due:
                        delay_rows.insert(database, [(*part[:3], due[0], 0) for part in taken], made.now_ms)
                    for at in range(offset, offset + count):
                        if waiting.pop((partition, at), None) is not None and due:
                            waiting[partition, at] = due[0]
                case "clock", (now_ms,):
                    made.now_ms = now_ms
                case "draw", (partition,):
                    delay_rows.draw_near(database, partition, made.now_ms)
                    left = delay_rows.to_draw(made.ask, [partition], made.now_ms)
                    assert left == [], "so few rows are drawn in one step"
                case "page", (partition, until_ms, size):
                    found = made.page(partition, (-1, partition << SHIFT), until_ms, size)
                    expected = [each for each in pieces(waiting, partition) if each[0] <= until_ms]
                    parts = [
                        (due_ms, (place & delay_rows.OFFSETS) + at)
                        for due_ms, place, count, _ in found
                        for at in range(count)
                    ]
                    assert parts == expected[: len(parts)]
                    assert len(found) == size or len(parts) == len(expected)
        for partition in range(PARTITIONS):
            assert list(made.all(partition, limit)) == pieces(waiting, partition)
        tasks = {partition: len(pieces(waiting, partition)) for partition in range(PARTITIONS)}
        standing = delay_rows.counts(made.ask)
        assert {partition: standing.get(partition, 0) for partition in tasks} == tasks


def test_only_so_many_rows_are_drawn_near_in_one_step_and_the_rest_is_left_to_the_next() -> None:
    rows: list[Row] = [(place, 1, 0, 9 * SPAN_MS + place, 0) for place in range(delay_rows.DRAW_ROWS + 10)]
    with table() as made:
        delay_rows.insert(made.database, rows, now_ms=0)
        assert delay_rows.to_draw(made.ask, [0, 1], 0) == []
        near_ms = 8 * SPAN_MS
        assert delay_rows.draw_near(made.database, 0, near_ms) == delay_rows.DRAW_ROWS
        assert delay_rows.to_draw(made.ask, [0, 1], near_ms) == [0]
        assert delay_rows.draw_near(made.database, 0, near_ms) == 10
        assert delay_rows.to_draw(made.ask, [0, 1], near_ms) == []
        assert len(made.page(0, (-1, 0), EVER_MS, 10**6)) == len(rows)
