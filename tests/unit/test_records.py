"""The work history: what is added is found, written or not; a file that cannot be written loses nothing."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup.ids import Ids, TaskId, ids_of, keyed_id
from node.records import (
    Attempt,
    Ending,
    EventKind,
    HistoryUnusable,
    RecordedEvent,
    Records,
    RecordsLimits,
    TaskFilter,
    recorded,
)
from node.records_file import RUN_MAX, HistoryFile
from raft.commands import (
    Answered,
    Cancel,
    Deleted,
    Effects,
    Fact,
    Freed,
    Outcome,
    Proposal,
    Resolved,
    Revive,
    Span,
    Suspected,
    Verdict,
)
from raft.commands import (
    Testified as WasTestified,  # pytest would collect a name that begins with Test
)

KEY = keyed_id("default", "order-1")


def attempt(ids: Ids, **changes: object) -> Attempt:
    fields: dict[str, object] = {
        "queue": "default",
        "handler": "shop.charge",
        "node": "n1",
        "fence": 7,
        "attempt": 1,
        "claimed_ms": 1000,
        "started_ms": 1001,
        "ended_ms": 1002,
        "ending": Ending.DONE,
    }
    return Attempt(ids=ids, **(fields | changes))  # type: ignore[arg-type]


def run(start: int, count: int = 1) -> Ids:
    return Ids(((start, count),))


@pytest.fixture
def records(tmp_path: Path):
    opened = Records.open(tmp_path / "history.db", clock_ms=lambda: 10_000)
    yield opened
    opened.close()


def test_an_attempt_is_found_by_each_of_its_ids_with_that_ids_result(records: Records) -> None:
    records.add_attempts([attempt(Ids(((10, 3),), (KEY,)), results=(b"1", b"2", b"3", b'"k"'))])

    def found(task_id: TaskId) -> list[Attempt]:
        return records.attempts(task_id)

    before = [found(10), found(12), found(KEY), found(13), found(9)]
    assert records.flush()
    assert [found(10), found(12), found(KEY), found(13), found(9)] == before
    assert before == [
        [attempt(run(10), results=(b"1",))],
        [attempt(run(12), results=(b"3",))],
        [attempt(Ids((), (KEY,)), results=(b'"k"',))],
        [],
        [],
    ]


def test_attempts_come_back_oldest_first_across_file_and_memory(records: Records) -> None:
    records.add_attempts([attempt(run(5, 4), ending=Ending.RETRY, error="ValueError: no")])
    records.flush()
    records.add_attempts([attempt(run(1, 10), attempt=2, fence=9)])
    assert [(one.attempt, one.fence) for one in records.attempts(6)] == [(1, 7), (2, 9)]


def test_a_run_longer_than_the_limit_is_found_at_both_ends(records: Records) -> None:
    records.add_attempts([attempt(run(1, 3 * RUN_MAX + 1))])
    records.flush()
    assert all(records.attempts(i) for i in (1, RUN_MAX, RUN_MAX + 1, 3 * RUN_MAX + 1))
    assert not records.attempts(3 * RUN_MAX + 2)


def test_history_survives_closing(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    first = Records.open(path, clock_ms=lambda: 10_000)
    first.add_attempts([attempt(run(1))])
    assert first.close() == 0
    second = Records.open(path, clock_ms=lambda: 10_000)
    second.add_attempts([attempt(run(1), attempt=2)])
    second.flush()
    assert [one.attempt for one in second.attempts(1)] == [1, 2]
    second.close()


def test_an_event_applied_again_after_a_restart_stands_once_with_its_first_time(records: Records) -> None:
    event = RecordedEvent(40, 1, EventKind.SUSPECTED, run(1, 5), 1000, fence=7, node="n2", what="lapsed")
    records.add_events([event])
    records.flush()
    again = RecordedEvent(40, 1, EventKind.SUSPECTED, run(1, 5), 9000, fence=7, node="n2", what="lapsed")
    records.add_events([again])
    assert [one.at_ms for one in records.events(3)] == [1000]
    records.flush()
    assert [one.at_ms for one in records.events(3)] == [1000]


def test_a_search_pages_through_every_task_once_newest_first(records: Records) -> None:
    records.add_attempts([attempt(run(1, 5)), attempt(run(10, 2), ending=Ending.DEAD, error="Boom: 50%")])
    records.flush()
    records.add_attempts([attempt(run(20, 3), queue="mail")])
    seen: list[TaskId] = []
    after: str | None = None
    while True:
        page = records.search(TaskFilter(), 4, after)
        seen += [next(iter(one.ids)) for one in page.attempts]
        after = page.next
        if after is None:
            break
    assert seen == [20, 21, 22, 10, 11, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (TaskFilter(endings=(Ending.DEAD,)), [10, 11]),
        (TaskFilter(queue="mail"), [20]),
        (TaskFilter(handler="shop.charge", since_ms=2000), [10, 11]),
        (TaskFilter(until_ms=2000), [20, 1]),
        (TaskFilter(error="BOOM: 50%"), [10, 11]),
        (TaskFilter(error="nothing"), []),
    ],
)
@pytest.mark.parametrize("written", [False, True])
def test_a_search_finds_by_each_field(
    records: Records, wanted: TaskFilter, expected: list[int], written: bool
) -> None:
    records.add_attempts(
        [
            attempt(run(1)),
            attempt(run(10, 2), ending=Ending.DEAD, error="Boom: 50% of it", ended_ms=2000),
            attempt(run(20), queue="mail"),
        ]
    )
    if written:
        records.flush()
    assert [next(iter(one.ids)) for one in records.search(wanted, 10).attempts] == expected


@pytest.mark.parametrize("after", ["1", "x.y", "1.-2", "1.2.3", "1" * 5000 + ".0"])
def test_a_bad_cursor_is_named(records: Records, after: str) -> None:
    with pytest.raises(ValueError, match="after="):
        records.search(TaskFilter(), 1, after)


def test_a_file_that_cannot_be_written_keeps_every_row_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = threading.Event()
    full.set()
    told = threading.Semaphore(0)
    write = HistoryFile.write

    def write_unless_full(self: HistoryFile, attempts: object, events: object) -> None:
        if full.is_set():
            raise sqlite3.OperationalError("database or disk is full")
        write(self, attempts, events)  # type: ignore[arg-type]

    monkeypatch.setattr(HistoryFile, "write", write_unless_full)
    limits = RecordsLimits(rows_max=3)
    records = Records.open(tmp_path / "history.db", limits, clock_ms=lambda: 10_000, on_change=told.release)
    assert records.add_attempts([attempt(run(1))])
    assert told.acquire(timeout=10)
    assert records.trouble is not None
    assert "disk is full" in records.trouble
    assert not records.add_attempts([attempt(run(2)), attempt(run(3))])
    assert not records.room
    assert records.attempts(3), "what could not be written is still read"
    full.clear()
    assert told.acquire(timeout=10)
    assert (records.trouble, records.room, records.unwritten) == (None, True, 0)
    assert records.attempts(1)
    assert records.attempts(3)
    assert records.close() == 0


def test_text_that_is_no_unicode_does_not_block_the_history(records: Records) -> None:
    records.add_attempts([attempt(run(1), error="bad \ud800 name", ending=Ending.DEAD)])
    assert records.flush()
    assert records.attempts(1)[0].error == "bad ? name"


def test_old_rows_are_forgotten_with_their_places(tmp_path: Path) -> None:
    file = HistoryFile(tmp_path / "history.db")
    file.write(
        [(1, attempt(Ids(((1, 9000),), (KEY,)), ended_ms=100)), (2, attempt(run(5), ended_ms=900))],
        [(3, RecordedEvent(1, 0, EventKind.CANCELLED, run(5), 100))],
    )
    assert file.prune(before_ms=500, bytes_max=1 << 30) == 2
    assert (list(file.attempts(5)), list(file.attempts(KEY)), list(file.events(5))) == ([2], [], [])
    assert file.prune(before_ms=500, bytes_max=1 << 30) == 0
    assert file.prune(before_ms=0, bytes_max=0) == 1, "too large: the oldest go, whatever their age"
    assert file.rows_next() == 1
    file.close()


def test_a_newer_format_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(HistoryUnusable, match=r"history\.db has format 99"):
        Records.open(path)


def test_a_file_that_is_no_database_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    path.write_bytes(b"not a database" * 1000)
    with pytest.raises(HistoryUnusable, match="move it away"):
        Records.open(path)


def test_only_the_rare_things_of_an_entry_are_recorded() -> None:
    commands = (Cancel(run(1, 2), "ana"), Revive(run(10, 4), "bob"))
    answers = (
        Answered((Span(2, Outcome.SETTLED),)),
        Answered((Span(1, Outcome.NEW), Span(2, Outcome.SETTLED), Span(1, Outcome.BUSY))),
    )
    effects = Effects(
        index=50,
        proposal=Proposal(1, 1, commands),
        answers=answers,
        events=(
            Deleted(run(1, 2), "ana"),
            Freed(run(11, 2)),
            Suspected(run(20, 3), 9, "n2", 4, "lapsed"),
            WasTestified(run(20), 9, "n2", Fact.NEVER_STARTED),
            Resolved(run(20), 9, Verdict.NOT_EXECUTED, "testimony", "it never started"),
        ),
    )
    assert recorded(effects, 77) == [
        RecordedEvent(50, 0, EventKind.CANCELLED, run(1, 2), 77, by="ana"),
        RecordedEvent(50, 1, EventKind.SUSPECTED, run(20, 3), 77, 9, "n2", 4, what="lapsed"),
        RecordedEvent(50, 2, EventKind.TESTIFIED, run(20), 77, 9, "n2", what="never started", by="n2"),
        RecordedEvent(
            50, 3, EventKind.RESOLVED, run(20), 77, 9, what="not executed", by="testimony",
            reason="it never started",
        ),
        RecordedEvent(50, 4, EventKind.REVIVED, run(11, 2), 77, by="bob"),
    ]  # fmt: skip
    assert recorded(Effects(50, effects.proposal, answers, effects.events, repeated=True), 77) == []


KEYS = [keyed_id("q", str(number)) for number in range(4)]
TASK_IDS = st.one_of(st.integers(1, 60), st.sampled_from(KEYS))


@settings(max_examples=40, deadline=None)
@given(
    batches=st.lists(st.lists(TASK_IDS, min_size=1, max_size=12, unique=True), max_size=8),
    flushes=st.sets(st.integers(0, 7)),
)
def test_every_lookup_equals_a_plain_list_of_attempts(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[TaskId]], flushes: set[int]
) -> None:
    path = tmp_path_factory.mktemp("records") / "history.db"
    records = Records.open(path, clock_ms=lambda: 10_000)
    plain: dict[TaskId, list[tuple[int, bytes]]] = {}
    try:
        for number, batch in enumerate(batches):
            ids = ids_of(batch)
            results = tuple(b'"%s of %d"' % (str(one).encode(), number) for one in ids)
            records.add_attempts([attempt(ids, fence=number, results=results)])
            for task_id, result in zip(ids, results, strict=True):
                plain.setdefault(task_id, []).append((number, result))
            if number in flushes:
                assert records.flush()
        for task_id in [*range(62), *KEYS]:
            found = [(one.fence, one.results[0]) for one in records.attempts(task_id) if one.results]
            assert found == plain.get(task_id, [])
    finally:
        records.close()
