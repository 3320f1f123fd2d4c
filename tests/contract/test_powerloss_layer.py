"""The power-loss layer itself, with real processes: it loses what was not synced, nothing else, and sees bugs."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from raft.journal import Journal, JournalDamaged
from tests.support.powerloss import PowerLossRecorder, Recording
from tests.support.powerloss_disk import Loss

REPOSITORY = Path(__file__).resolve().parents[2]


def record(tmp_path: Path, *programs: str) -> Recording:
    """Run the programs at the same time, each in ``data``, and give back what they did."""
    data = tmp_path / "data"
    data.mkdir(exist_ok=True)
    recorder = PowerLossRecorder(data, tmp_path / "scratch")
    env = recorder.env(os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"})
    running = [
        subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], cwd=data, env=env)
        for program in programs
    ]
    assert [process.wait(60) for process in running] == [0] * len(programs)
    return recorder.recording()


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and not path.name.endswith("-shm")
    }


def test_a_program_loses_exactly_what_it_did_not_sync(tmp_path: Path) -> None:
    recording = record(
        tmp_path,
        """
        import os
        def make(name):
            return os.open(name, os.O_RDWR | os.O_CREAT)
        half, none, unnamed = make("half"), make("none"), None
        os.write(half, b"synced,"); os.fdatasync(half); os.write(half, b" and not")
        os.write(none, b"lost")
        folder = os.open(".", os.O_RDONLY); os.fsync(folder)
        unnamed = make("unnamed"); os.write(unnamed, b"synced, but its name is not"); os.fsync(unnamed)
        """,
    )
    assert contents(recording.rebuild(tmp_path / "cut", loss=Loss.ALL)) == {"half": b"synced,", "none": b""}
    images = [contents(recording.rebuild(tmp_path / f"cut-{seed}", seed=seed)) for seed in range(40)]
    assert all(image["half"].startswith(b"synced,") for image in images)
    assert {image["none"] for image in images} >= {b"", b"lost"}
    assert {"unnamed" in image for image in images} == {True, False}


def test_a_rename_that_was_not_synced_gives_the_old_or_the_new_file_and_a_synced_one_the_new(
    tmp_path: Path,
) -> None:
    recording = record(
        tmp_path,
        """
        import os
        folder = os.open(".", os.O_RDONLY)
        for text in (b"old", b"new", b"newest"):
            with open("temporary", "wb") as f:
                f.write(text); f.flush(); os.fsync(f.fileno())
            os.replace("temporary", "file")
            if text == b"old":
                os.fsync(folder)
        """,
    )
    images = [contents(recording.rebuild(tmp_path / f"cut-{seed}", seed=seed)) for seed in range(60)]
    assert {image["file"] for image in images} == {b"old", b"new", b"newest"}
    assert contents(recording.rebuild(tmp_path / "cut", loss=Loss.ALL)) == {"file": b"old"}


def test_without_loss_the_rebuilt_directory_is_the_real_one_whichever_call_wrote_it(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "before").write_bytes(b"there already, " * 10)
    recording = record(
        tmp_path,
        """
        import os, shutil, subprocess, sys
        def make(name):
            return os.open(name, os.O_RDWR | os.O_CREAT)
        fd = make("calls")
        os.write(fd, b"write"); os.writev(fd, [b"wri", b"tev"]); os.pwrite(fd, b"pwrite", 100)
        os.pwritev(fd, [b"pwr", b"itev"], 50); os.posix_fallocate(fd, 0, 300); os.ftruncate(fd, 250)
        copy = os.dup(fd); os.lseek(copy, 0, os.SEEK_END); os.write(copy, b"through a copy")
        shutil.copyfile("before", "copied")
        os.copy_file_range(os.open("before", os.O_RDONLY), make("ranged"), 40, 3)
        open("appended", "ab").write(b"one"); open("appended", "ab").write(b"two")
        os.truncate("before", 7); open("emptied", "wb").write(b"x" * 9); open("emptied", "wb").close()
        os.mkdir("folder"); os.rename("appended", "folder/moved"); os.link("copied", "folder/linked")
        os.rename("folder", "renamed"); os.unlink("copied")
        os.makedirs("deep/er"); open("deep/er/file", "w").write("deep")
        subprocess.run([sys.executable, "-c", "open('child', 'w').write('of a child')"], check=True)
        subprocess.run("echo from a shell > shell; echo more >> shell", shell=True, check=True)
        """,
    )
    real = contents(tmp_path / "data")
    assert real["renamed/moved"] == b"onetwo"
    assert contents(recording.rebuild(tmp_path / "kept", loss=Loss.NONE)) == real


def test_a_memory_mapped_file_goes_back_to_what_was_written_by_calls_and_synced(tmp_path: Path) -> None:
    recording = record(
        tmp_path,
        """
        import mmap, os
        fd = os.open("mapped", os.O_RDWR | os.O_CREAT)
        os.write(fd, bytes(4096)); os.fsync(fd); os.fsync(os.open(".", os.O_RDONLY))
        map = mmap.mmap(fd, 4096); map[0:5] = b"marks"; map.flush()
        """,
    )
    assert contents(tmp_path / "data")["mapped"].startswith(b"marks")
    assert contents(recording.rebuild(tmp_path / "cut"))["mapped"] == bytes(4096)


SQLITE = """
    import os, sqlite3
    acks = os.open("acks-{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    db = sqlite3.connect("tasks.db", timeout=30, isolation_level=None)
    while True:
        try:
            db.execute("pragma journal_mode=wal")
            break
        except sqlite3.OperationalError:  # it does not wait for the other process, which does the same
            pass
    db.execute("pragma synchronous={synchronous}")
    db.execute("pragma wal_autocheckpoint=20")
    db.execute("create table if not exists t (name text, n integer, pad text)")
    for n in range(60):
        db.execute("begin immediate")
        db.execute("insert into t values (?, ?, ?)", ("{name}", n, "x" * (n * 37 % 3000)))
        db.execute("commit")
        os.write(acks, b"%d\\n" % n)
"""


def acknowledged(recording: Recording, name: str, upto: int) -> set[int]:
    return {int(line) for line in recording.written(recording.directory / f"acks-{name}", upto).split()}


def sqlite_losses(recording: Recording, tmp_path: Path, names: str) -> list[str]:
    """What acknowledged rows are missing, or what else is wrong, image by image."""
    losses = []
    for number, upto in enumerate(recording.moments(60, seed=1)):
        loss = Loss.ALL if number % 4 == 0 else Loss.RANDOM
        image = recording.rebuild(tmp_path / f"image-{number}", seed=number, upto=upto, loss=loss)
        expected = {(name, n) for name in names for n in acknowledged(recording, name, upto)}
        try:
            db = sqlite3.connect(image / "tasks.db")
            there = set(db.execute("select name, n from t")) if expected else set()
            (health,) = db.execute("pragma integrity_check").fetchone()
            db.close()
        except sqlite3.Error as error:
            losses.append(f"upto={upto} seed={number}: {error}")
            continue
        if health != "ok" or not expected <= there:
            losses.append(f"upto={upto} seed={number}: {health}, lost {sorted(expected - there)}")
    return losses


def test_sqlite_with_full_sync_keeps_each_committed_row_of_two_processes_in_every_image(
    tmp_path: Path,
) -> None:
    recording = record(tmp_path, *(SQLITE.format(name=name, synchronous="full") for name in "ab"))
    assert acknowledged(recording, "a", len(recording.events)) == set(range(60))
    assert contents(recording.rebuild(tmp_path / "kept", loss=Loss.NONE)) == contents(tmp_path / "data")
    assert sqlite_losses(recording, tmp_path, "ab") == []


def test_sqlite_without_sync_loses_committed_rows_in_some_image(tmp_path: Path) -> None:
    recording = record(tmp_path, SQLITE.format(name="a", synchronous="off"))
    assert len(sqlite_losses(recording, tmp_path, "a")) > 5


JOURNAL = """
    import os, random
    from raft import files
    from raft.journal import Journal
    {bug}
    rng = random.Random({seed})
    acks = os.open("acks", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    journal = Journal.open("raft", segment_bytes=3000)
    index = 0
    for turn in range(120):
        for _ in range(rng.randrange(1, 5)):
            index += 1
            journal.add(rng.randbytes(rng.randrange(300)), index, 1 + turn // 10)
        if turn % 10 == 0:
            journal.setCurrentTerm(1 + turn // 10, "node-%d" % turn)
        journal.sync()
        os.write(acks, b"%d %d\\n" % (index, journal.getCurrentTerm()))
        if turn % 25 == 24:
            journal.deleteEntriesTo(len(journal) - 20)
            journal.onOneSecondTimer()
"""
NO_SYNC = "files.OsFile.fdatasync = lambda self: None"


def journal_losses(recording: Recording, tmp_path: Path, tag: str) -> list[str]:
    losses = []
    for number, upto in enumerate(recording.moments(150, seed=2)):
        loss = Loss.ALL if number % 4 == 0 else Loss.RANDOM
        image = recording.rebuild(tmp_path / f"image-{tag}-{number}", seed=number, upto=upto, loss=loss)
        lines = recording.written(recording.directory / "acks", upto).split(b"\n")
        index, term = map(int, lines[-2].split()) if len(lines) > 1 else (0, 0)
        try:
            journal = Journal.open(image / "raft")
        except JournalDamaged as damage:
            losses.append(f"upto={upto} seed={number}: {damage}")
            continue
        if journal.last_index < index or journal.getCurrentTerm() < term:
            losses.append(f"upto={upto} seed={number}: {journal.last_index} < {index} or term below {term}")
        elif (
            journal.getCurrentTerm()
            and journal.getVotedForNodeId() != f"node-{10 * journal.getCurrentTerm() - 10}"
        ):
            losses.append(f"upto={upto} seed={number}: vote {journal.getVotedForNodeId()}")
        journal.close()
    return losses


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_journal_keeps_all_that_it_synced_in_every_image(tmp_path: Path, seed: int) -> None:
    recording = record(tmp_path, JOURNAL.format(bug="", seed=seed))
    assert journal_losses(recording, tmp_path, "sound") == []


def test_a_journal_that_skips_its_sync_is_seen(tmp_path: Path) -> None:
    recording = record(tmp_path, JOURNAL.format(bug=NO_SYNC, seed=1))
    assert len(journal_losses(recording, tmp_path, "bug")) > 20


def test_a_recording_is_readable_when_its_process_was_killed(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    recorder = PowerLossRecorder(data, tmp_path / "scratch")
    program = """
        import os
        fd = os.open("file", os.O_WRONLY | os.O_CREAT)
        print("ready", flush=True)
        while True:
            os.pwrite(fd, bytes(1 << 20), 0)
    """
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program)],
            cwd=data,
            env=recorder.env(),
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
        process.wait()
        process.stdout.close()
    recorder.recording().rebuild(tmp_path / "cut")
