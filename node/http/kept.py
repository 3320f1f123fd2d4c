"""What the HTTP layer asks of the log's store of delayed tasks; all of it runs in the log's thread."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from dedup.ids import TaskId, parse_id
from node.http.wire import ApiError
from oncekeeper.log.delayed import Delayed, Place, delays_of
from oncekeeper.log.port import Fetched, TaskLog, Undecodable

CURSOR = "due."


class Cursor(NamedTuple):
    """After which row the page begins, and how many tasks of the next one are told already."""

    after: Delayed
    skip: int

    def __str__(self) -> str:
        row = self.after
        return f"{CURSOR}{row.due_ms}.{row.partition}.{row.offset}.{self.skip}"


BEGIN = Cursor(Delayed(0, 0, 0), 0)


def parse_cursor(after: str) -> Cursor:
    if not after:
        return BEGIN
    numbers = after.removeprefix(CURSOR).split(".")
    if len(numbers) != 4 or not all(part.isascii() and part.isdigit() and len(part) < 19 for part in numbers):
        raise ApiError(400, f"after={after[:40]!r} must be the 'next' of an earlier page", "after")
    due_ms, partition, offset, skip = map(int, numbers)
    return Cursor(Delayed(due_ms, partition, offset), skip)


def page(
    log: TaskLog, until_ms: int, after: Delayed, rows_max: int
) -> tuple[list[tuple[Delayed, Fetched | Undecodable]], Delayed | None]:
    """What is kept, in due order, and the row after which there is more."""
    delays = delays_of(log)
    if delays is None:
        return [], None
    rows = delays.due(range(log.partitions), until_ms, after, rows_max)
    return delays.fetch(rows), rows[-1] if len(rows) == rows_max else None


def present_due(log: TaskLog, task_id: TaskId) -> int:
    """When it is due by the store; 0: it is not there."""
    delays = delays_of(log)
    rows = delays.find(task_id) if delays is not None else []
    return rows[0].due_ms if rows else 0


def those_kept(log: TaskLog, ids: Iterable[str]) -> set[str]:
    """Which of these (texts of ids) are kept."""
    return {each for each in ids if present_due(log, parse_id(each))}


def forget(log: TaskLog, task_id: TaskId) -> None:
    """It is cancelled, and will not be due."""
    delays = delays_of(log)
    rows = delays.find(task_id) if delays is not None else []
    if delays is not None and rows:
        delays.drop([Place(row.partition, row.offset) for row in rows])
