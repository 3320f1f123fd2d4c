"""What the work journal keeps, and what a restarted node may conclude from it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup.ids import Ids
from node.workers import journal as layout
from node.workers.journal import Journal, Space, State, WorkerJournal
from node.workers.port import Mode
from node.workers.testimony import Evidence, forget, incarnations, read_testimony, write_manifest
from raft import commands
from raft.commands import Fact

BOOT = "0e8a2f1c-0000-4000-8000-000000000001"
KEYS = (b"a" * 16, b"b" * 16)


@pytest.fixture(autouse=True)
def boot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(layout.BOOT_ID_VARIABLE, BOOT)


def make(tmp_path: Path, *names: str, size: int = layout.DATA_AT + 64 * 64) -> list[Journal]:
    directory = tmp_path / "7"
    directory.mkdir()
    journals = [Journal(directory / name, 7, BOOT, size) for name in names]
    write_manifest(directory, 7, BOOT, names)
    return journals


def test_each_state_byte_becomes_its_fact_with_its_fence(tmp_path: Path) -> None:
    (one,) = make(tmp_path, "a")
    record = one.put(Mode.RUN, 40, Ids(((10, 2),), KEYS), 4)
    assert record is not None
    record.states[:] = bytes((State.FINISHED, State.STARTED, State.FAILED, State.NOT_STARTED))
    assert read_testimony(tmp_path, 7) == Evidence(
        True,
        (
            commands.Testimony(40, Ids((), (KEYS[1],)), Fact.NEVER_STARTED),
            commands.Testimony(40, Ids(((11, 1),)), Fact.STARTED),
            commands.Testimony(40, Ids(((10, 1),)), Fact.FINISHED),
            commands.Testimony(40, Ids((), (KEYS[0],)), Fact.FAILED),
        ),
    )


def test_the_workers_marks_reach_the_reader_through_the_file(tmp_path: Path) -> None:
    (one,) = make(tmp_path, "a")
    record = one.put(Mode.RUN, 3, Ids(((1, 2),)), 2)
    assert record is not None
    worker = WorkerJournal(str(one.path))
    worker.states(record.states_at, 2)[1] = State.FINISHED
    one.set_lease(123)
    assert worker.lease[0] == 123
    assert bytes(record.states) == bytes((State.NOT_STARTED, State.FINISHED))


def test_a_freed_record_says_nothing_and_its_room_is_used_again(tmp_path: Path) -> None:
    (one,) = make(tmp_path, "a", size=layout.DATA_AT + 64)
    record = one.put(Mode.RUN, 3, Ids(((1, 2),)), 2)
    assert record is not None
    assert one.put(Mode.RUN, 4, Ids(((3, 1),)), 1) is None, "there is no room"
    one.free(record)
    assert read_testimony(tmp_path, 7) == Evidence(True, ())
    assert one.put(Mode.RUN, 4, Ids(((3, 1),)), 1) is not None
    assert read_testimony(tmp_path, 7).facts == (commands.Testimony(4, Ids(((3, 1),)), Fact.NEVER_STARTED),)


def test_checks_and_validations_are_no_testimony(tmp_path: Path) -> None:
    (one,) = make(tmp_path, "a")
    one.put(Mode.CHECK, 3, Ids(((1, 1),)), 1, State.STARTED)
    one.put(Mode.VALIDATE, 3, Ids(((2, 1),)), 1, State.STARTED)
    assert read_testimony(tmp_path, 7) == Evidence(True, ())


@pytest.mark.parametrize(
    ("first", "second", "fact"),
    [
        (State.NOT_STARTED, State.FINISHED, Fact.FINISHED),
        (State.STARTED, State.NOT_STARTED, Fact.STARTED),
        (State.FAILED, State.STARTED, Fact.STARTED),
        (State.FINISHED, State.STARTED, Fact.FINISHED),
    ],
)
def test_of_two_records_of_one_claim_the_graver_counts(
    tmp_path: Path, first: State, second: State, fact: Fact
) -> None:
    one, other = make(tmp_path, "a", "b")
    one.put(Mode.RUN, 3, Ids(((1, 1),)), 1, first)
    other.put(Mode.RUN, 3, Ids(((1, 1),)), 1, second)
    assert read_testimony(tmp_path, 7) == Evidence(True, (commands.Testimony(3, Ids(((1, 1),)), fact),))


def test_a_missing_journal_takes_the_never_started_of_all_others_away(tmp_path: Path) -> None:
    one, other = make(tmp_path, "a", "b")
    one.put(Mode.RUN, 3, Ids(((1, 1),)), 1)
    one.put(Mode.RUN, 4, Ids(((2, 1),)), 1, State.FINISHED)
    other.path.unlink()
    evidence = read_testimony(tmp_path, 7)
    assert not evidence.complete
    assert evidence.facts == (commands.Testimony(4, Ids(((2, 1),)), Fact.FINISHED),)


@pytest.mark.parametrize(
    "at",
    [3, 20, layout.ENTRIES_AT + 9, layout.ENTRIES_AT + 17, layout.ENTRIES_AT + 21, layout.DATA_AT + 1],
    ids=["magic", "incarnation", "fence", "mode", "data_at", "ids"],
)
def test_a_flipped_bit_in_header_entry_or_ids_is_no_evidence_for_absence(tmp_path: Path, at: int) -> None:
    (one,) = make(tmp_path, "a")
    one.put(Mode.RUN, 3, Ids(((1, 1),)), 1)
    damage(one.path, at)
    evidence = read_testimony(tmp_path, 7)
    assert (evidence.complete, evidence.facts) == (False, ())
    assert evidence.why.startswith("a: ")


def damage(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes((byte ^ 0x40,)))


def test_a_state_byte_out_of_range_is_damage(tmp_path: Path) -> None:
    (one,) = make(tmp_path, "a")
    record = one.put(Mode.RUN, 3, Ids(((1, 1),)), 1)
    assert record is not None
    record.states[0] = 9
    assert not read_testimony(tmp_path, 7).complete


def test_a_truncated_journal_is_damage(tmp_path: Path) -> None:
    (one,) = make(tmp_path, "a")
    os.truncate(one.path, layout.DATA_AT)
    assert not read_testimony(tmp_path, 7).complete


def test_after_a_power_loss_nothing_is_evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = make(tmp_path, "a")
    one.put(Mode.RUN, 3, Ids(((1, 1),)), 1, State.FINISHED)
    monkeypatch.setenv(layout.BOOT_ID_VARIABLE, "another")
    assert read_testimony(tmp_path, 7) == Evidence(
        False, (), "the machine was restarted since: unsynced marks prove nothing"
    )


def test_a_missing_or_damaged_manifest_is_no_evidence(tmp_path: Path) -> None:
    assert not read_testimony(tmp_path, 7).complete
    make(tmp_path, "a")
    (tmp_path / "7" / "manifest.json").write_bytes(b"{")
    assert not read_testimony(tmp_path, 7).complete


def test_dropped_records_are_confessed(tmp_path: Path) -> None:
    (one,) = make(tmp_path, "a")
    one.set_lossy()
    assert not read_testimony(tmp_path, 7).complete


def test_a_worker_that_still_runs_is_waited_for_and_then_counts_as_missing(tmp_path: Path) -> None:
    (one,) = make(tmp_path, "a")
    one.put(Mode.RUN, 3, Ids(((1, 1),)), 1, State.FINISHED)
    fd = os.open(one.path, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    assert read_testimony(tmp_path, 7, wait_s=0.05) == Evidence(
        False, (), "a: a worker of that incarnation is still running"
    )
    os.close(fd)
    assert read_testimony(tmp_path, 7, wait_s=0.05).complete


def test_incarnations_are_listed_and_forgotten(tmp_path: Path) -> None:
    make(tmp_path, "a")
    assert incarnations(tmp_path) == (7,)
    forget(tmp_path, 7)
    assert incarnations(tmp_path) == ()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=60))
def test_space_never_hands_out_what_is_taken_and_gets_all_of_it_back(steps: list[tuple[bool, int]]) -> None:
    space, taken = Space(64, 64 + 32 * 64), []
    for take, granules in steps:
        if take:
            at = space.take(granules * 64)
            if at is not None:
                assert at % 64 == 0
                assert at >= 64
                assert at + granules * 64 <= 64 + 32 * 64
                assert all(at + granules * 64 <= low or low + size <= at for low, size in taken)
                taken.append((at, granules * 64))
        elif taken:
            space.give(*taken.pop(granules % len(taken)))
    for stretch in taken:
        space.give(*stretch)
    assert space.take(32 * 64) == 64, "what is given back is one stretch again"
