"""What is delayed fires once and never early, whatever comes between: pages, moves, drops, slow answers, the clock.

The store is the one in memory; answers come late and in any order, as from a thread. A row may be fired again
only where the port says so (after a partition was given up and came back). Planted bugs show that this is seen.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from dedup.ids import Ids
from node import dues
from node.dues import Dues, DueSettings, EnqueueDue, FetchDue, LoadDue
from oncekeeper.envelope import TaskBatch
from oncekeeper.log.delayed import ENQUEUE, RUN, Deferral, Delayed, Place
from oncekeeper.log.memory import MemoryLog
from oncekeeper.log.port import Fetched

START_MS = 1_800_000_000_000
SETTINGS = DueSettings(horizon_ms=100, rows_max=6, fetch_max=8)


class Play:
    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.wall_ms = self.latest_ms = START_MS
        self.log = MemoryLog(3, lambda: self.wall_ms)
        self.dues = Dues(SETTINGS, self.wall_ms)
        self.epochs = {0: 1, 1: 1, 2: 1}
        self.dues.assign(self.epochs)
        self.answers: list[Callable[[], None]] = []
        self.due: dict[int, int] = {}  # by task id
        self.places: dict[int, tuple[int, int]] = {}
        self.fired: list[int] = []
        self.again: set[int] = set()  # may have been fired before their partition moved
        self.enqueued: set[int] = set()

    def submit(self) -> None:
        count, first = self.draw.randint(1, 4), 1 + 10 * len(self.places)
        due_ms = self.wall_ms + self.draw.choice([1, 30, 90, 110, 400])
        ids = Ids(((first, count),))
        (place,) = self.log.append([TaskBatch(queue="q", handler="h", ids=ids, bodies=(b"{}",) * count)])
        (item,) = self.log.read(place.partition, place.base, count, 10**6)
        assert isinstance(item, Fetched)
        then = self.draw.choice([RUN, RUN, ENQUEUE])
        self.log.delays.defer([Deferral(place.partition, place.base, due_ms, then, item.batch)])
        row = Delayed(due_ms, place.partition, place.base, count, then)
        for n in range(count):
            self.due[first + n] = due_ms
            self.places[first + n] = (place.partition, place.base + n)
        self.later(lambda: self.dues.stored([row]))

    def later(self, answer: Callable[[], None]) -> None:
        self.answers.append(answer)

    def look(self) -> None:
        asked_ms = self.wall_ms  # the clock may be set back before the answer
        for effect in self.dues.look(self.wall_ms, self.draw.choice([0, 3, 50])):
            match effect:
                case LoadDue(partition, _, until_ms, after, limit):
                    rows = self.log.delays.due((partition,), until_ms, after, limit)
                    self.later(lambda load=effect, rows=rows: self.dues.loaded(load, rows))  # type: ignore[misc]
                case FetchDue(rows):
                    found = self.log.delays.fetch(rows)
                    self.later(lambda fetch=effect, found=found: self.fetched(fetch, found, asked_ms))  # type: ignore[misc]
                case EnqueueDue(rows):
                    for row, item in self.log.delays.fetch(rows):
                        self.fire(row, item, asked_ms)
                    self.log.delays.enqueue(rows)
                    self.later(lambda enqueue=effect: self.dues.fetched(FetchDue(enqueue.rows), ()))  # type: ignore[misc]

    def fetched(self, fetch: FetchDue, found: list[tuple[Delayed, Any]], asked_ms: int) -> None:
        for row, epoch, item in self.dues.fetched(fetch, found):
            assert epoch == self.epochs[row.partition]
            if self.draw.random() < 0.2:  # not to be claimed yet: it waits in memory, and is looked up again
                at = self.draw.randrange(row.count)
                self.later(lambda row=row, at=at: self.wait(row, at))  # type: ignore[misc]
                continue
            self.fire(row, item, asked_ms)
            self.later(lambda row=row: self.dues.settled(row, row.offset, row.count))  # type: ignore[misc]

    def wait(self, row: Delayed, at: int) -> None:
        for offset, count in ((row.offset, at), (row.offset + at, row.count - at)):
            if count:
                self.dues.again(row, offset, count)

    def fire(self, row: Delayed, item: object, asked_ms: int) -> None:
        assert isinstance(item, Fetched)
        for task_id in item.batch.ids:
            assert isinstance(task_id, int)
            assert self.due[task_id] <= asked_ms, f"task {task_id} is early"
            assert task_id not in self.fired or task_id in self.again, f"task {task_id} was fired twice"
            self.fired.append(task_id)

    def drop(self) -> None:
        self.log.delays.drop(self.dues.drops())

    def change(self) -> None:
        """Somebody cancels or reschedules a task that waits, on another node."""
        waiting = sorted(set(self.due) - set(self.fired))
        if not waiting:
            return
        task_id = self.draw.choice(waiting)
        partition, offset = self.places[task_id]
        # Its row is cut; its neighbours may be on their way, and come again by the page that is loaded then.
        self.again |= {near for near in self.places if near // 10 == task_id // 10}
        if self.draw.random() < 0.4:
            if self.log.delays.drop([Place(partition, offset)]):
                # It may be on its way already; then the ledger's word on it counts, which is not played here.
                self.due[task_id] = 0
        else:
            due_ms = self.wall_ms + self.draw.choice([5, 50, 300])
            self.log.delays.move([Place(partition, offset)], due_ms)
            self.due[task_id] = min(due_ms, self.due[task_id])  # likewise
            self.reload(partition)

    def reload(self, partition: int) -> None:
        # What is in hand in parts comes again as the row that it was; what is settled and not dropped yet, too. The
        # node knows that it has the one, and the ledger that the other ran.
        self.again |= {
            task_id
            for task_id, (there, _) in self.places.items()
            if there == partition and self.due[task_id] <= self.latest_ms
        }
        self.dues.reload(partition)

    def rebalance(self) -> None:
        partition = self.draw.randrange(3)
        if partition in self.epochs:
            self.gone = self.epochs.pop(partition)
        else:
            self.epochs[partition] = self.draw.randrange(10**9)
        self.again |= {task_id for task_id, (there, _) in self.places.items() if there == partition}
        self.dues.assign(self.epochs)

    def step(self) -> None:
        what = self.draw.random()
        if what < 0.25:
            self.submit()
        elif what < 0.32:
            self.change()
        elif what < 0.35:
            self.rebalance()
        elif what < 0.40:
            self.drop()
        elif what < 0.75 and self.answers:
            self.answers.pop(self.draw.randrange(len(self.answers)))()
        else:
            self.wall_ms += self.draw.choice([0, 1, 5, 40, 40, -30])
            self.latest_ms = max(self.latest_ms, self.wall_ms)
            self.look()

    def finish(self) -> None:
        for partition in range(3):
            self.epochs.setdefault(partition, self.draw.randrange(10**9))
        self.dues.assign(self.epochs)
        for _ in range(600):
            while self.answers:
                self.answers.pop(0)()
            self.drop()
            self.look()
            if not self.answers and not self.log.delays.counts():
                break
            self.wall_ms += 10
        missing = sorted(
            task_id for task_id, due_ms in self.due.items() if due_ms and task_id not in self.fired
        )
        assert missing == [], f"never fired, of {len(self.due)}"
        assert self.log.delays.counts() == {}
        while self.answers:
            self.answers.pop(0)()
        assert self.dues.in_hand == 0


def play(seed: int, steps: int = 400) -> None:
    game = Play(seed)
    try:
        for _ in range(steps):
            game.step()
        game.finish()
    except AssertionError as error:
        error.add_note(f"seed {seed}")
        raise


def play_all(seeds: range) -> None:
    for seed in seeds:
        play(seed)


@pytest.mark.parametrize("first", range(0, 120, 20))
def test_what_is_delayed_fires_once_and_never_early(first: int) -> None:
    play_all(range(first, first + 20))


def _holds_nothing(self: object, row: Delayed) -> bool:
    return False


def _forgets_what_is_cut(self: Dues, load: LoadDue, rows: list[Delayed]) -> None:
    _LOADED(self, LoadDue(load.partition, load.epoch, load.until_ms, load.after, 10**6), rows)


def _inserts_what_is_busy(self: Dues, known: Any, row: Delayed) -> None:
    if row not in self._wheel:
        self._wheel.insert(row.due_ms, row)
        known.rows += 1


def _early(self: Dues, wall_ms: int, room: int) -> list[dues.Effect]:
    return _LOOK(self, wall_ms + 7, room)


_LOADED, _LOOK = Dues.loaded, Dues.look


@pytest.mark.parametrize(
    ("owner", "name", "bug"),
    [
        (dues._Known, "holds", _holds_nothing),
        (Dues, "loaded", _forgets_what_is_cut),
        (Dues, "_insert", _inserts_what_is_busy),
        (Dues, "look", _early),
    ],
)
def test_a_planted_bug_is_seen(
    owner: type, name: str, bug: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, bug)
    with pytest.raises(AssertionError):
        play_all(range(60))
