"""Rows of delayed tasks that outlived their tasks, in the stores of one machine, by a real ledger's word."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dedup.ids import Ids
from node.leftovers import STEP_ROWS, Leftovers
from oncekeeper.envelope import TaskBatch
from oncekeeper.log.delayed import RUN, Deferral, Delayed
from oncekeeper.log.embedded import EmbeddedLog, open_log
from oncekeeper.log.memory import MemoryLog
from oncekeeper.log.port import Fetched, Unsent
from raft import commands as c
from raft.ledger import Ledger

DUE_MS = 1_900_000_000_000
AWAY_MS = 60_000


class Book:
    """A ledger, and what has been proposed to it."""

    def __init__(self) -> None:
        self.ledger = Ledger(bloom_seed=1)
        self._index = 0
        self.propose(c.AllocateIds(100_000))
        self.session = self.propose(c.Join("n1", 1, 10_000)).session

    def propose(self, command: c.Command) -> Any:
        self._index += 1
        effects = self.ledger.apply_proposal(self._index, c.Proposal(1, self._index, (command,)))
        return effects.answers[0]

    def run(self, ids: Ids) -> None:
        fence = self.propose(c.Claim(self.session, ids)).spans[0].fence
        self.propose(c.Settle(self.session, (c.Settlement(fence, ids, c.Result.DONE),)))

    def cancel(self, ids: Ids) -> None:
        self.propose(c.Cancel(ids, "a test"))


class Direct:
    """A PatientLog without threads."""

    def __init__(self, log: object) -> None:
        self.log: Any = log

    async def run(self, work: Callable[[Any], Any]) -> Any:
        return work(self.log)


@pytest.fixture(params=["embedded", "memory"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EmbeddedLog | MemoryLog]:
    makers: dict[str, Callable[[], EmbeddedLog | MemoryLog]] = {
        "embedded": lambda: open_log(tmp_path, create=True, partitions=4),
        "memory": lambda: MemoryLog(4, lambda: 0),
    }
    made = makers[request.param]()
    yield made
    made.close()


def delay(log: Any, start: int, count: int) -> None:
    ids = Ids(((start, count),))
    batch = TaskBatch(queue="q", handler="h", ids=ids, bodies=(b"{}",) * count, due_ms=DUE_MS + start)
    (place,) = log.append([batch])
    log.delays.defer([Deferral(place.partition, place.base, DUE_MS + start, RUN, batch)])


def waiting(log: Any) -> list[int]:
    rows: list[Delayed] = log.delays.due(range(4), 1 << 60, None, 10**6)
    items = [item for _, item in log.delays.fetch(rows) if isinstance(item, Fetched)]
    return sorted(int(task_id) for item in items for task_id in item.batch.ids)


def sweep(log: Any, book: Book, is_leader: Callable[[], bool] = lambda: True) -> tuple[bool, int]:
    leftovers = Leftovers(book.ledger, Direct(log), is_leader=is_leader, step_ms=0)  # type: ignore[arg-type]
    return asyncio.run(leftovers.sweep()), leftovers.dropped


def test_what_is_closed_loses_its_rows_and_what_is_open_keeps_them(log: Any) -> None:
    book = Book()
    for start in (100, 200, 300, 400, 500):
        delay(log, start, 10)
    book.cancel(Ids(((103, 4),)))
    book.run(Ids(((200, 10),)))
    book.propose(c.Claim(book.session, Ids(((300, 10),))))  # it runs
    book.cancel(Ids(((400, 1),)))
    book.propose(c.Revive(Ids(((400, 1),))))
    assert sweep(log, book) == (True, 14)
    open_ones = [*range(100, 103), *range(107, 110), *range(300, 310), *range(400, 410), *range(500, 510)]
    assert waiting(log) == open_ones
    assert sweep(log, book) == (True, 0)


def test_a_pass_goes_over_page_after_page(log: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.leftovers.PAGE_ROWS", 30)
    monkeypatch.setattr("node.leftovers.STEP_ROWS", 7)
    book = Book()
    for task_id in range(1, 401):
        delay(log, task_id, 1)
    book.cancel(Ids(((50, 300),)))
    assert sweep(log, book) == (True, 300)
    assert waiting(log) == [*range(1, 50), *range(350, 401)]


def test_who_leads_no_more_gives_up_and_whoever_leads_next_begins_anew(log: Any) -> None:
    book = Book()
    for task_id in range(1, 3 * STEP_ROWS * 4):
        delay(log, task_id, 1)
    book.cancel(Ids(((1, 3 * STEP_ROWS * 4 - 1),)))
    asked = iter([True, True, False])
    done, dropped = sweep(log, book, lambda: next(asked))
    assert (done, dropped) == (False, 2 * STEP_ROWS)
    assert sweep(log, book)[0]
    assert waiting(log) == []


def test_a_store_that_cannot_be_written_is_left_to_the_next_pass(
    log: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = Book()
    delay(log, 1, 5)
    book.cancel(Ids(((1, 5),)))

    def full(*_: object) -> None:
        raise Unsent("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(log.delays, "drop", full)
        assert sweep(log, book) == (False, 0)
    assert sweep(log, book) == (True, 5)


def test_a_log_without_a_store_has_no_leftovers() -> None:
    assert sweep(object(), Book()) == (False, 0)
