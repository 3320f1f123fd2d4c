"""The embedded log as a file that several processes share, and that disks, crashes and other versions threaten."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import pytest

from dedup.ids import Ids
from oncekeeper.envelope import TaskBatch
from oncekeeper.errors import LogUnusable
from oncekeeper.log.embedded import EmbeddedLog, open_log
from oncekeeper.log.embedded_file import log_path
from oncekeeper.log.port import Aside, Fetched, Undecodable, UnknownAppend, Unsent

ROOT = Path(__file__).parents[2]


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EmbeddedLog]:
    log = open_log(tmp_path, create=True, partitions=4, cluster_id="one")
    yield log
    log.close()


def run(start: int, count: int, body: bytes = b"{}") -> TaskBatch:
    return TaskBatch(queue="q", handler="h", ids=Ids(((start, count),)), bodies=(body,) * count)


def sql(path: Path, statement: str, *values: object) -> None:
    database = sqlite3.connect(log_path(path))
    with database:
        database.execute(statement, values)
    database.close()


def ids_in(log: EmbeddedLog) -> list[int]:
    found: list[int] = []
    for partition in range(log.partitions):
        for fetched in log.read(partition, 0, 10**6, 10**9):
            assert isinstance(fetched, Fetched)
            found += [task_id for task_id in fetched.batch.ids if isinstance(task_id, int)]
    return sorted(found)


# --- opening --------------------------------------------------------------------------------------------------


def test_a_data_directory_and_the_file_in_it_are_the_same_log(tmp_path: Path, log: EmbeddedLog) -> None:
    assert log.file == tmp_path / "log" / "tasks.db"
    again = open_log(log.file, cluster_id="one")
    log.append([run(1, 1)])
    assert ids_in(again) == [1]
    again.close()


def test_a_log_that_is_missing_is_not_made_by_chance(tmp_path: Path) -> None:
    with pytest.raises(LogUnusable, match=r"tasks\.db: there is no task log here; .*cluster up"):
        open_log(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_opening_says_what_does_not_agree(tmp_path: Path, log: EmbeddedLog) -> None:
    with pytest.raises(LogUnusable, match="belongs to cluster one, not to two"):
        open_log(tmp_path, cluster_id="two")
    with pytest.raises(LogUnusable, match="has partitions=4, not 5"):
        open_log(tmp_path, create=True, partitions=5)
    with pytest.raises(LogUnusable, match="partitions=0 must be from 1"):
        open_log(tmp_path, create=True, partitions=0)


def test_a_newer_format_is_refused(tmp_path: Path, log: EmbeddedLog) -> None:
    sql(tmp_path, "UPDATE meta SET value = 99 WHERE name = 'format'")
    with pytest.raises(LogUnusable, match="format 99 is not the format 3 that this version reads"):
        open_log(tmp_path)


@pytest.mark.parametrize("content", [b"not a database, by any means" * 100, b""])
def test_a_file_that_is_no_log_is_refused_and_left_as_it_was(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.db"
    file.write_bytes(content)
    with pytest.raises(LogUnusable, match=r"x\.db: (not a task log|file is not a database)"):
        open_log(file)
    assert file.read_bytes() == content


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("in the way")
    with pytest.raises(LogUnusable, match="log"):
        open_log(tmp_path, create=True)


CREATE = """
import sys
from oncekeeper.log.embedded import open_log
open_log(sys.argv[1], create=True, partitions=4)
"""


def test_processes_that_make_the_same_log_at_once_make_one(tmp_path: Path) -> None:
    makers = [subprocess.Popen([sys.executable, "-c", CREATE, str(tmp_path)], cwd=ROOT) for _ in range(4)]
    assert [maker.wait() for maker in makers] == [0, 0, 0, 0]
    log = open_log(tmp_path)
    assert log.ends() == dict.fromkeys(range(4), 0)
    log.close()


# --- several processes ----------------------------------------------------------------------------------------

APPEND = """
import sys
from oncekeeper.log.embedded import open_log
from oncekeeper.envelope import TaskBatch
from dedup.ids import Ids
log = open_log(sys.argv[1])
start = int(sys.argv[2])
for n in range(start, start + int(sys.argv[3])):
    log.append([TaskBatch(queue="q", handler="h", ids=Ids(((n, 1),)), bodies=(b"{}",))])
    print(n, flush=True)
"""


def appender(path: Path, start: int, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", APPEND, str(path), str(start), str(count)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_processes_that_append_at_once_lose_nothing_and_share_no_offset(
    tmp_path: Path, log: EmbeddedLog
) -> None:
    appenders = [appender(tmp_path, 1 + 1000 * number, 100) for number in range(3)]
    for n in range(100):  # and a node moves positions meanwhile
        log.commit(log.ends())
        log.append([run(10_001 + n, 1)])
    for process in appenders:
        process.communicate()
    assert [process.returncode for process in appenders] == [0, 0, 0]
    expected = [1 + 1000 * number + n for number in range(3) for n in range(100)]
    assert ids_in(log) == sorted(expected + [10_001 + n for n in range(100)])
    assert sum(log.ends().values()) == 400


def test_what_was_acknowledged_before_a_kill_is_there(tmp_path: Path, log: EmbeddedLog) -> None:
    process = appender(tmp_path, 1, 10**6)
    assert process.stdout is not None
    acknowledged = [int(process.stdout.readline()) for _ in range(50)]
    process.send_signal(signal.SIGKILL)
    acknowledged += [int(line) for line in process.communicate()[0].split()]
    found = ids_in(log)
    assert set(acknowledged) <= set(found)
    assert len(found) - len(acknowledged) in (0, 1)  # stored, and killed before it could say so


def test_a_copy_of_what_is_synced_has_every_append(tmp_path: Path, log: EmbeddedLog) -> None:
    """No append rests on a checkpoint or a clean close: the files as they are make the log."""
    log.append([run(1, 300)])
    log.commit({0: 75})
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "log", copy / "log")
    (copy / "log" / "tasks.db-shm").unlink()  # only memory: rebuilt from the WAL
    other = open_log(copy)
    assert ids_in(other) == list(range(1, 301))
    assert other.committed()[0] == 75
    other.close()


# --- when it fails --------------------------------------------------------------------------------------------


def test_a_full_disk_is_unsent_and_stores_nothing(tmp_path: Path, log: EmbeddedLog) -> None:
    log.append([run(1, 1)])
    log._database.execute("PRAGMA max_page_count = 30")
    with pytest.raises(Unsent, match=r"tasks\.db: database or disk is full"):
        log.append([run(2, 1), run(100, 300, b'{"x": "' + b"y" * 1000 + b'"}')])
    assert ids_in(log) == [1]
    assert sum(log.ends().values()) == 1
    log._database.execute("PRAGMA max_page_count = 100000")
    log.append([run(2, 1)])
    assert ids_in(log) == [1, 2]


FULL = """
import resource, signal, sys
from oncekeeper.log.embedded import open_log
from oncekeeper.log.port import Unsent, UnknownAppend
from oncekeeper.envelope import TaskBatch
from dedup.ids import Ids
def run(start, count, body=b"{}"):
    return TaskBatch(queue="q", handler="h", ids=Ids(((start, count),)), bodies=(body,) * count)
log = open_log(sys.argv[1])
log.append([run(1, 1)])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))
try:
    log.append([run(2, 500, b'{"x": "' + b"y" * 1000 + b'"}')])
except (Unsent, UnknownAppend) as error:
    print(type(error).__name__)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.append([run(1000, 1)])
"""


def test_a_file_that_may_not_grow_is_reported_and_stores_nothing(tmp_path: Path, log: EmbeddedLog) -> None:
    output = subprocess.check_output([sys.executable, "-c", FULL, str(tmp_path)], cwd=ROOT, text=True)
    assert output.strip() in ("Unsent", "UnknownAppend")
    assert ids_in(log) == [1, 1000]


def test_a_lock_that_is_held_too_long_is_unsent(tmp_path: Path, log: EmbeddedLog) -> None:
    impatient = open_log(tmp_path, lock_timeout_ms=50)
    holder = sqlite3.connect(log.file, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unsent, match="database is locked"):
        impatient.append([run(1, 1)])
    assert ids_in(impatient) == []  # readers do not wait
    holder.execute("ROLLBACK")
    impatient.append([run(1, 1)])
    assert ids_in(log) == [1]
    impatient.close()
    holder.close()


def test_an_error_in_the_middle_of_a_commit_is_unknown(log: EmbeddedLog) -> None:
    class Failing:
        in_transaction = True

        def execute(self, statement: str, *values: Any) -> object:
            if statement == "COMMIT":
                error = sqlite3.OperationalError("disk I/O error")
                error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
                raise error
            return real.execute(statement, *values)

        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

    real, log._database = log._database, Failing()  # type: ignore[assignment]
    with pytest.raises(UnknownAppend, match="disk I/O error"):
        log.append([run(1, 1)])
    log._database = real
    assert not real.in_transaction
    log.append([run(1, 1)])
    assert len(log.find(1)) == 1


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"\x00junk", "message: "),
        (
            b'{"v":7,"queue":"q","handler":"h","id":"1","count":3,"bodies":[{},{},{}]}',
            "v: this version understands 1",
        ),
        (
            b'{"v":1,"queue":"q","handler":"h","id":"1","count":2,"bodies":[{},{}]}',
            "count: 2 tasks stand where 3",
        ),
    ],
)
def test_a_row_that_cannot_be_decoded_is_handed_out_as_such_and_does_not_stop_reading(
    tmp_path: Path, log: EmbeddedLog, message: bytes, reason: str
) -> None:
    places = [log.append([run(n * 10, 3)])[0] for n in range(1, 9)]
    first = places[0].partition
    crc = google_crc32c.value(message)
    sql(tmp_path, "UPDATE batches SET message = ?, crc = ? WHERE place = ?", message, crc, first << 44)
    bad, good = log.read(first, 1, 100, 10**6)
    assert isinstance(bad, Undecodable)
    assert (bad.partition, bad.base, bad.count, bad.raw) == (first, 1, 2, message)
    assert reason in bad.reason
    assert isinstance(good, Fetched)
    assert log.find(11) == []
    log.commit({first: 3})
    assert log.retain(0, 1 << 60) == 3


def test_a_flipped_bit_in_a_body_is_seen(tmp_path: Path, log: EmbeddedLog) -> None:
    (place,) = log.append([run(1, 3, b'{"cents":500}')])
    sql(tmp_path, "UPDATE batches SET message = CAST(replace(message, '500', '900') AS BLOB)")
    (bad,) = log.read(place.partition, 0, 10, 1000)
    assert isinstance(bad, Undecodable)
    assert "its checksum is not" in bad.reason
    assert log.find(2) == []


def test_a_damaged_page_is_an_error_that_names_the_file(tmp_path: Path, log: EmbeddedLog) -> None:
    log.append([run(1, 300)])
    log.close()
    size = log.file.stat().st_size
    with open(log.file, "r+b") as file:
        file.seek(8192)
        file.write(b"\xff" * (size - 8192))
    with pytest.raises(LogUnusable, match=r"tasks\.db: .*malformed"):
        open_log(tmp_path)


def test_closing_a_reader_in_the_middle_keeps_no_snapshot(log: EmbeddedLog) -> None:
    for n in range(100):
        log.append([run(1 + n, 1)])
    assert len(log.read(0, 0, 1, 1)) == 1
    assert not log._database.in_transaction
    busy, _, _ = log._database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    assert busy == 0


def test_bodies_are_for_their_owner_only(log: EmbeddedLog) -> None:
    log.append([run(1, 1)])
    assert {file.stat().st_mode & 0o777 for file in log.file.parent.iterdir()} == {0o600}


def test_a_clean_close_leaves_one_file(tmp_path: Path) -> None:
    log = open_log(tmp_path, create=True)
    log.put_aside([Aside("dead", 1, b"m", "r", 0)])
    log.close()
    assert os.listdir(tmp_path / "log") == ["tasks.db"]
    again = open_log(tmp_path)
    assert len(again.aside("dead", 0, 10)) == 1
    again.close()
