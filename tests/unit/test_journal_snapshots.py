"""The snapshot file: whole and checked, or the one before it."""

from __future__ import annotations

import errno

import pytest

from raft.journal import Journal, quarantine
from raft.snapshots import (
    Snapshot,
    SnapshotDamaged,
    SnapshotGap,
    SnapshotHeader,
    SnapshotRefused,
    SnapshotStore,
    check_alignment,
)
from tests.support.powerloss_files import PowerLost, SimulatedFiles

OLD = Snapshot(10, 1, b"old state" * 300)
NEW = Snapshot(20, 2, b"the new state" * 300)


def stored(snapshot: Snapshot = OLD, cluster_id: str = "") -> tuple[SimulatedFiles, SnapshotStore]:
    files = SimulatedFiles()
    store = SnapshotStore("/raft", files=files, cluster_id=cluster_id)
    store.write(snapshot)()
    return files, store


def test_a_snapshot_is_read_back_as_it_was_written() -> None:
    files, store = stored()
    assert store.load() == OLD
    store.write(NEW)()
    assert SnapshotStore("/raft", files=files).load() == NEW


def test_no_snapshot_is_none() -> None:
    store = SnapshotStore("/raft", files=SimulatedFiles())
    assert (store.load(), store.header(), store.sender()) == (None, None, None)


def test_a_power_loss_at_any_point_of_writing_leaves_the_old_or_the_new_one_whole() -> None:
    for step in range(1, 30):
        for seed in range(20):
            files, store = stored()
            files.power_fails_at(step)
            finished = False
            try:
                store.write(NEW)()
                finished = True
            except PowerLost:
                pass
            left = SnapshotStore("/raft", files=files.after_power_loss(seed)).load()
            assert left == NEW if finished else left in (OLD, NEW)
        if finished:
            assert step > 5
            return
    raise AssertionError("the snapshot was never finished")


def test_what_a_dead_process_had_begun_is_removed_at_start() -> None:
    files, store = stored()
    store.write(NEW)
    assert "snapshot.written.new" in files.list("/raft")
    assert SnapshotStore("/raft", files=files).load() == OLD
    assert files.list("/raft") == ["snapshot"]


@pytest.mark.parametrize("operation", ["pwrite", "fsync", "rename"])
def test_a_failed_write_leaves_the_old_snapshot(operation: str) -> None:
    files, store = stored()
    files.fail_next(operation, errno.ENOSPC)
    with pytest.raises(OSError, match="No space"):
        store.write(NEW)()
    assert store.load() == OLD


def test_every_flipped_bit_is_seen() -> None:
    size = stored()[0].size("/raft/snapshot")
    for bit in [*range(72 * 8), *range(72 * 8, size * 8, 97)]:
        files, store = stored()
        files.flip_bit("/raft/snapshot", bit)
        with pytest.raises((SnapshotDamaged, SnapshotRefused)):
            store.load()


def test_a_cut_snapshot_is_damaged() -> None:
    for size in (0, 30, 72, 500):
        files, store = stored()
        files.open("/raft/snapshot").truncate(size)
        with pytest.raises(SnapshotDamaged, match="/raft/snapshot"):
            store.load()


def test_a_newer_format_and_another_cluster_are_refused() -> None:
    files, _ = stored(cluster_id="ab" * 16)
    with pytest.raises(SnapshotRefused, match="belongs to cluster abab"):
        SnapshotStore("/raft", files=files, cluster_id="cd" * 16).load()
    files.open("/raft/snapshot").pwrite(b"\x07", 8)
    with pytest.raises(SnapshotRefused, match="snapshot format 7"):
        SnapshotStore("/raft", files=files, cluster_id="ab" * 16).load()


def test_an_older_snapshot_never_takes_the_place_of_a_later_one() -> None:
    _, store = stored(NEW)
    with pytest.raises(ValueError, match="snapshot 10 would replace the later 20"):
        store.write(OLD)()
    assert store.load() == NEW


def test_a_snapshot_travels_in_chunks_and_a_sender_keeps_its_file_while_a_newer_one_is_installed() -> None:
    _, source = stored()
    _, target = stored(Snapshot(1, 1, b""))
    sender, receiver = source.sender(), target.receiver()
    assert sender is not None
    source.write(NEW)()
    while chunk := sender.chunk(receiver.offset, 100):
        assert receiver.take(receiver.offset, chunk)
        assert not receiver.take(0, chunk)  # a chunk that comes twice is not taken twice
    assert receiver.install() == sender.header
    assert target.load() == OLD


def test_a_snapshot_damaged_on_its_way_is_not_installed() -> None:
    _, source = stored(NEW)
    _, target = stored()
    sender, receiver = source.sender(), target.receiver()
    assert sender is not None
    data = bytearray(sender.chunk(0, 1 << 20))
    data[700] ^= 1
    receiver.take(0, bytes(data))
    with pytest.raises(SnapshotDamaged):
        receiver.install()
    assert target.load() == OLD


def header(index: int) -> SnapshotHeader:
    return SnapshotHeader(bytes(16), index, 1, 0, 0)


def journal_from(first: int, last: int) -> Journal:
    journal = Journal.open("/raft", files=SimulatedFiles())
    for index in range(first, last + 1):
        journal.add(b"", index, 1)
    return journal


def test_a_journal_that_meets_its_snapshot_is_whole() -> None:
    check_alignment(journal_from(1, 5), None)
    check_alignment(journal_from(1, 5), header(3))
    check_alignment(journal_from(1, 5), header(9))
    check_alignment(journal_from(4, 5), header(3))


def test_a_gap_between_snapshot_and_journal_and_a_lost_journal_are_refused() -> None:
    with pytest.raises(SnapshotGap, match="ends at entry 3 and the journal begins at 5"):
        check_alignment(journal_from(5, 9), header(3))
    with pytest.raises(SnapshotGap, match="begins at entry 5, and there is no snapshot"):
        check_alignment(journal_from(5, 9), None)
    with pytest.raises(SnapshotGap, match="the journal is empty"):
        check_alignment(journal_from(1, 0), header(3))


def test_a_node_that_rejoins_may_begin_with_a_snapshot_alone() -> None:
    files = SimulatedFiles()
    Journal.open("/raft", files=files).close()
    quarantine("/raft", files)
    check_alignment(Journal.open("/raft", files=files), header(3))
