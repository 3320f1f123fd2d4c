"""The journal against a model: whatever is done and wherever power fails, what was synced is there again."""

from __future__ import annotations

import errno
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from raft.journal import Entry, Journal, JournalDamaged, JournalError, JournalFailed, JournalRefused
from tests.support.powerloss_files import PowerLost, SimulatedFiles, any_bit

DIRECTORY = "/node/raft"
SEGMENT_BYTES = 700  # small, so that a few operations make and drop segments
WORDS = ("add", "add", "add", "add", "sync", "sync", "cut", "drop", "vote", "clear", "timer")


@dataclass
class State:
    entries: list[Entry] = field(default_factory=list)
    term: int = 0
    vote: str | None = None

    def copy(self) -> State:
        return State(list(self.entries), self.term, self.vote)


def state_of(journal: Journal) -> State:
    return State(list(journal[:]), journal.getCurrentTerm(), journal.getVotedForNodeId())


class Run:
    """Random operations on a journal, and every state that a crash now may leave.

    ``allowed[0]`` is the last state known to be synced; what follows are later ones whose sync has not returned.
    """

    def __init__(self, files: SimulatedFiles, rng: random.Random, journal: Journal) -> None:
        self.files, self.rng, self.journal = files, rng, journal
        self.model = state_of(journal)
        self.allowed = [self.model.copy()]

    def step(self) -> None:
        word = self.rng.choice(WORDS)
        model, journal, rng = self.model, self.journal, self.rng
        count = len(model.entries)
        if word == "add":
            last = model.entries[-1][1] if count else (self._base() - 1)
            entry = (rng.randbytes(rng.choice((0, 1, 40, 900))), last + 1, model.term)
            model.entries.append(entry)
            journal.add(*entry)
        elif word == "cut" and count:
            at = rng.randrange(count)
            del model.entries[at:]
            journal.deleteEntriesFrom(at)
        elif word == "drop" and count:
            at = rng.randrange(count)
            del model.entries[:at]
            journal.deleteEntriesTo(at)
        elif word == "clear" and rng.random() < 0.3:
            model.entries.clear()
            journal.clear()
        elif word == "vote":
            model.term += 1
            model.vote = rng.choice((None, "n1:1", "n2:2"))
            self._synced(lambda: journal.setCurrentTerm(model.term, model.vote))
        elif word in ("sync", "timer"):
            self._synced(journal.sync if word == "sync" else journal.onOneSecondTimer)

    def _base(self) -> int:
        """The next index of an emptied journal: after a cut it must follow, after a clear it may be any."""
        return self.journal._next_index or self.rng.randrange(1, 1000)

    def _synced(self, act: object) -> None:
        self.allowed.append(self.model.copy())
        act()  # type: ignore[operator]
        self.allowed = [self.allowed[-1]]


def reopened(files: SimulatedFiles) -> Journal:
    return Journal.open(DIRECTORY, files=files, segment_bytes=SEGMENT_BYTES)


def crash_and_reopen(seed: int, lives: int = 4) -> None:
    rng = random.Random(seed)
    files = SimulatedFiles()
    allowed = [State()]
    for _ in range(lives):
        if rng.random() < 0.8:
            files.power_fails_at(rng.randrange(1, 80))
        run = None
        try:
            journal = reopened(files)
            assert state_of(journal) in allowed, f"seed {seed}"
            run = Run(files, rng, journal)
            for _ in range(60):
                run.step()
            if rng.random() < 0.5:
                run.model = run.model.copy()
                run._synced(journal.close)
        except PowerLost:
            pass
        allowed = run.allowed if run is not None else allowed
        files = files.after_kill() if rng.random() < 0.2 else files.after_power_loss(rng.randrange(1 << 30))
    assert state_of(reopened(files)) in allowed, f"seed {seed}"


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 1 << 40))
@example(1)
def test_after_a_crash_at_any_point_the_journal_is_what_was_synced_or_the_whole_of_what_was_being_synced(
    seed: int,
) -> None:
    crash_and_reopen(seed)


def grown(seed: int) -> tuple[SimulatedFiles, State]:
    rng = random.Random(seed)
    files = SimulatedFiles()
    run = Run(files, rng, reopened(files))
    for _ in range(60):
        run.step()
    run._synced(run.journal.close)
    return files, run.allowed[-1]


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 1 << 40))
def test_a_flipped_bit_anywhere_is_harmless_or_refused_but_never_believed(seed: int) -> None:
    files, expected = grown(seed)
    rng = random.Random(seed)
    path = f"{DIRECTORY}/{rng.choice(files.list(DIRECTORY))}"
    files.flip_bit(path, any_bit(files, path, rng))
    try:
        found = state_of(reopened(files))
    except (JournalDamaged, JournalRefused):
        return
    assert found == expected, f"seed {seed}, {path}"


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 1 << 40))
def test_a_lost_file_is_always_refused(seed: int) -> None:
    files, _ = grown(seed)
    names = files.list(DIRECTORY)
    files.lose(f"{DIRECTORY}/{random.Random(seed).choice(names)}")
    with pytest.raises(JournalDamaged):
        reopened(files)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 1 << 40))
def test_a_file_cut_short_anywhere_is_harmless_or_refused_but_never_believed(seed: int) -> None:
    files, expected = grown(seed)
    rng = random.Random(seed)
    path = f"{DIRECTORY}/{rng.choice(files.list(DIRECTORY))}"
    file = files.open(path)
    file.truncate(rng.randrange(file.size()))
    try:
        found = state_of(reopened(files))
    except JournalDamaged:
        return
    assert found == expected, f"seed {seed}, {path}"


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 1 << 40))
def test_an_error_of_any_operation_stops_the_journal_and_loses_nothing_synced(seed: int) -> None:
    rng = random.Random(seed)
    files = SimulatedFiles()
    run = Run(files, rng, reopened(files))
    operation = rng.choice(("pwrite", "fdatasync", "fsync", "open", "rename", "unlink", "sync_directory"))
    files.fail_next(operation, rng.choice((errno.EIO, errno.ENOSPC)), after=rng.randrange(20))
    try:
        for _ in range(80):
            run.step()
    except JournalFailed:
        with pytest.raises(JournalError):
            run.journal.add(b"", 1, 1)
    left = files.after_kill() if rng.random() < 0.5 else files.after_power_loss(seed)
    assert state_of(reopened(left)) in run.allowed, f"seed {seed}"


class _SyncIsSkipped(SimulatedFiles):
    """A planted bug: fdatasync that does nothing."""

    def open(self, path: str, *, create: bool = False):  # type: ignore[no-untyped-def]
        file = super().open(path, create=create)
        file.fdatasync = lambda: None  # type: ignore[method-assign]
        return file


def test_the_crash_property_sees_a_skipped_sync() -> None:
    seen = 0
    for seed in range(40):
        rng = random.Random(seed)
        files: SimulatedFiles = _SyncIsSkipped()
        run = Run(files, rng, reopened(files))
        for _ in range(40):
            run.step()
        try:
            seen += state_of(reopened(files.after_power_loss(seed))) not in run.allowed
        except JournalDamaged:
            seen += 1
    assert seen > 10
