"""The journal against the real file system: what it keeps, what it cuts, what it refuses."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from raft.journal import Journal, JournalDamaged, JournalFailed, JournalRefused, quarantine
from raft.journal_recovery import segment_name
from tests.support.powerloss_disk import Loss
from tests.support.powerloss_files import PowerLost, SimulatedFiles

CLUSTER = "ab" * 16


def filled(directory: Path, count: int, *, segment_bytes: int = 1 << 20, every: int = 1) -> Journal:
    journal = Journal.open(directory, segment_bytes=segment_bytes)
    for index in range(1, count + 1):
        journal.add(b"command %d" % index, index, 1)
        if index % every == 0:
            journal.sync()
    journal.sync()
    return journal


def newest(directory: Path) -> Path:
    return max(directory.glob("*.segment"))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def test_entries_term_and_vote_survive_reopening(tmp_path: Path) -> None:
    journal = filled(tmp_path, 20)
    journal.setCurrentTerm(7, "127.0.0.1:4001")
    journal.setRaftCommitIndex(15)
    journal.add(b"last", 21, 7)
    journal.close()
    again = Journal.open(tmp_path)
    assert len(again) == 21
    assert again[-1] == (b"last", 21, 7)
    assert again[3:5] == [(b"command 4", 4, 1), (b"command 5", 5, 1)]
    assert (again.getCurrentTerm(), again.getVotedForNodeId()) == (7, "127.0.0.1:4001")
    assert again.getRaftCommitIndex() == 15
    assert again.synced_index == 21
    assert again.bytes_total == sum(len(entry[0]) for entry in again[:])


def test_synced_index_lags_behind_what_was_only_added(tmp_path: Path) -> None:
    journal = filled(tmp_path, 3)
    journal.add(b"x", 4, 1)
    assert (journal.last_index, journal.synced_index) == (4, 3)
    journal.sync()
    assert journal.synced_index == 4
    journal.deleteEntriesFrom(1)
    assert (journal.last_index, journal.synced_index) == (1, 1)


def test_conflicting_entries_are_replaced_durably(tmp_path: Path) -> None:
    journal = filled(tmp_path, 10)
    journal.deleteEntriesFrom(4)
    journal.add(b"from the new leader", 5, 2)
    journal.close()
    again = Journal.open(tmp_path)
    assert [entry[1] for entry in again[:]] == [1, 2, 3, 4, 5]
    assert again[4] == (b"from the new leader", 5, 2)


def test_trimming_the_head_unlinks_whole_segments_and_keeps_the_rest(tmp_path: Path) -> None:
    journal = filled(tmp_path, 200, segment_bytes=1000)
    before = len(list(tmp_path.glob("*.segment")))
    journal.deleteEntriesTo(150)
    journal.sync()
    assert len(list(tmp_path.glob("*.segment"))) < before / 2
    assert journal[0][1] == 151
    journal.close()
    assert Journal.open(tmp_path)[0] == (b"command 151", 151, 1)


def test_a_vote_outlives_the_segment_that_it_was_written_to(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path, segment_bytes=500)
    journal.setCurrentTerm(3, "a:1")
    for index in range(1, 100):
        journal.add(b"x" * 50, index, 3)
        journal.sync()
    journal.deleteEntriesTo(98)
    journal.close()
    assert not (tmp_path / segment_name(1)).exists()
    again = Journal.open(tmp_path)
    assert (again.getCurrentTerm(), again.getVotedForNodeId()) == (3, "a:1")


def test_after_clear_the_next_entry_may_have_any_index(tmp_path: Path) -> None:
    journal = filled(tmp_path, 50, segment_bytes=500)
    journal.clear()
    journal.add(b"previous", 900, 4)
    journal.add(b"last", 901, 4)
    journal.close()
    assert Journal.open(tmp_path)[:] == [(b"previous", 900, 4), (b"last", 901, 4)]


def test_an_entry_out_of_order_is_refused(tmp_path: Path) -> None:
    journal = filled(tmp_path, 3)
    with pytest.raises(ValueError, match="entry 5 cannot be added: 4 must follow"):
        journal.add(b"x", 5, 1)


def test_a_vote_never_changes_in_its_term_and_terms_never_fall(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    journal.setCurrentTerm(2, "a:1")
    with pytest.raises(ValueError, match="cannot become 'b:1'"):
        journal.setCurrentTerm(2, "b:1")
    with pytest.raises(ValueError, match="cannot become None"):
        journal.setCurrentTerm(2, None)
    with pytest.raises(ValueError, match="term 1 is below"):
        journal.setCurrentTerm(1, None)
    journal.setCurrentTerm(3, None)
    journal.setCurrentTerm(3, "b:1")
    assert journal.getVotedForNodeId() == "b:1"


@pytest.mark.parametrize("lost", [1, 5, 24, 40])
def test_a_torn_tail_is_cut_to_the_last_whole_batch(lost: int) -> None:
    files = SimulatedFiles()
    journal = Journal.open("/raft", files=files)
    journal.add(b"kept", 1, 1)
    journal.sync()
    length = files.size(f"/raft/{segment_name(1)}")
    journal.add(b"torn", 2, 1)
    files.power_fails_at(2)  # written, and power fails in the sync
    with pytest.raises(PowerLost):
        journal.sync()
    torn = files.after_power_loss(0, Loss.NONE)
    file = torn.open(f"/raft/{segment_name(1)}")
    file.truncate(file.size() - lost)
    again = Journal.open("/raft", files=torn)
    assert again[:] == [(b"kept", 1, 1)]
    assert again.torn_bytes > 0
    assert torn.size(f"/raft/{segment_name(1)}") == length


def test_a_bad_batch_before_a_good_one_is_damage_and_names_file_and_offset(tmp_path: Path) -> None:
    filled(tmp_path, 20).close()
    (tmp_path / "synced").write_bytes(bytes(1024))  # without the mark the batches themselves must tell
    path = newest(tmp_path)
    flip(path, 300)
    with pytest.raises(JournalDamaged, match="a good one at offset") as caught:
        Journal.open(tmp_path)
    assert caught.value.path == str(path)
    assert 200 < caught.value.offset <= 300
    assert "rejoin" in str(caught.value)


@pytest.mark.parametrize("where", [-1, -30, -50])
def test_damage_to_the_very_last_synced_batch_is_not_taken_for_a_torn_tail(
    tmp_path: Path, where: int
) -> None:
    filled(tmp_path, 5).close()
    flip(newest(tmp_path), where)
    with pytest.raises(JournalDamaged, match="synced before"):
        Journal.open(tmp_path)


def test_a_synced_batch_that_is_cut_off_is_damage(tmp_path: Path) -> None:
    filled(tmp_path, 5).close()
    path = newest(tmp_path)
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(JournalDamaged, match="synced before"):
        Journal.open(tmp_path)


@pytest.mark.parametrize("which", [0, 3, -1])
def test_a_missing_segment_is_damage(tmp_path: Path, which: int) -> None:
    filled(tmp_path, 100, segment_bytes=800).close()
    sorted(tmp_path.glob("*.segment"))[which].unlink()
    with pytest.raises(JournalDamaged, match="is missing"):
        Journal.open(tmp_path)


def test_segments_without_their_mark_and_a_mark_without_segments_are_damage(tmp_path: Path) -> None:
    filled(tmp_path, 3).close()
    mark = (tmp_path / "synced").read_bytes()
    (tmp_path / "synced").unlink()
    with pytest.raises(JournalDamaged, match="missing beside existing segments"):
        Journal.open(tmp_path)
    (tmp_path / "synced").write_bytes(mark)
    newest(tmp_path).unlink()
    with pytest.raises(JournalDamaged, match="is missing"):
        Journal.open(tmp_path)


def test_damage_in_a_closed_segment_is_seen_even_at_its_very_end(tmp_path: Path) -> None:
    filled(tmp_path, 100, segment_bytes=800).close()
    flip(sorted(tmp_path.glob("*.segment"))[2], -1)
    with pytest.raises(JournalDamaged, match="closed at"):
        Journal.open(tmp_path)


def test_a_newer_format_and_another_cluster_are_refused(tmp_path: Path) -> None:
    Journal.open(tmp_path, cluster_id=CLUSTER).close()
    with pytest.raises(JournalRefused, match=f"belongs to cluster {CLUSTER}"):
        Journal.open(tmp_path, cluster_id="cd" * 16)
    path = newest(tmp_path)
    data = bytearray(path.read_bytes())
    data[8] = 9
    path.write_bytes(data)
    with pytest.raises(JournalRefused, match="journal format 9, and this program knows formats up to 1"):
        Journal.open(tmp_path, cluster_id=CLUSTER)


@pytest.mark.parametrize("operation", ["pwrite", "fdatasync"])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_after_a_failed_write_or_sync_the_journal_refuses_everything(operation: str, error: int) -> None:
    files = SimulatedFiles()
    journal = Journal.open("/raft", files=files)
    journal.add(b"kept", 1, 1)
    journal.sync()
    files.fail_next(operation, error)
    journal.add(b"unknown", 2, 1)
    with pytest.raises(JournalFailed, match="failed"):
        journal.sync()
    for refused in (
        journal.sync,
        journal.clear,
        lambda: journal.add(b"x", 3, 1),
        lambda: journal[0],
        lambda: len(journal),
        lambda: journal.setCurrentTerm(9, None),
        lambda: journal.deleteEntriesTo(1),
        journal.onOneSecondTimer,
    ):
        with pytest.raises(JournalFailed):
            refused()
    journal.close()


def test_a_full_disk_leaves_no_half_write_that_is_believed() -> None:
    files = SimulatedFiles()
    journal = Journal.open("/raft", files=files)
    journal.add(b"kept", 1, 1)
    journal.sync()
    files.bytes_max = sum(files.size(f"/raft/{name}") for name in files.list("/raft")) + 70
    journal.add(b"x" * 100, 2, 1)
    with pytest.raises(JournalFailed, match="No space left"):
        journal.sync()
    again = Journal.open("/raft", files=files.after_kill())
    assert again[:] == [(b"kept", 1, 1)]
    assert again.torn_bytes == 70


def test_what_a_failed_sync_left_in_the_page_cache_is_written_again_before_it_is_believed() -> None:
    files = SimulatedFiles()
    journal = Journal.open("/raft", files=files)
    journal.add(b"unknown", 1, 1)
    files.fail_next("fdatasync", errno.EIO)
    with pytest.raises(JournalFailed):
        journal.sync()
    restarted = files.after_kill()  # the kernel still shows the bytes, but has marked them clean
    believed = Journal.open("/raft", files=restarted)[:]
    assert believed == [(b"unknown", 1, 1)]
    assert Journal.open("/raft", files=restarted.after_power_loss(0, Loss.ALL))[:] == believed


def test_a_damaged_store_is_moved_aside_and_its_node_may_only_learn(tmp_path: Path) -> None:
    filled(tmp_path, 5).close()
    flip(newest(tmp_path), -1)
    aside = Path(quarantine(tmp_path))
    assert sorted(path.name for path in aside.iterdir()) == [segment_name(1), "synced"]
    journal = Journal.open(tmp_path)
    assert (len(journal), journal.rejoining) == (0, True)
    journal.close()
    assert Journal.open(tmp_path).rejoining
    journal = Journal.open(tmp_path)
    journal.finish_rejoining()
    journal.close()
    assert not Journal.open(tmp_path).rejoining


def test_an_interrupted_quarantine_never_looks_like_a_new_node() -> None:
    for step in range(1, 40):
        files = SimulatedFiles()
        journal = Journal.open("/raft", files=files)
        journal.setCurrentTerm(5, "a:1")
        journal.close()
        files.flip_bit(f"/raft/{segment_name(1)}", 900)
        files.power_fails_at(step)
        try:
            quarantine("/raft", files)
        except PowerLost:
            pass
        else:
            assert step > 8
            return
        for seed in range(20):
            left = files.after_power_loss(seed)
            try:
                reopened = Journal.open("/raft", files=left)
            except JournalDamaged:
                quarantine("/raft", left)
                reopened = Journal.open("/raft", files=left)
            assert reopened.rejoining, (step, seed)
    raise AssertionError("quarantine never finished")
