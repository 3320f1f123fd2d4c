"""What a node that was killed, and started again, can still say about the work of its former life.

One directory for each incarnation: ``work/<incarnation>/`` with a manifest, written before the first work is
handed over, and the journals it names. A fact is evidence only if it cannot be misread:

- state bytes of sound records of this boot are facts: they were stored by the worker, in order;
- absence is evidence too ("never handed over"), and "not started" of one journal is, but only if *every* journal
  is there and sound: the same claim may have been handed to a second worker after the first one died;
- another boot id means that the page cache was lost: pages reached the disk in any order, so nothing is evidence.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from dedup.ids import KEY_BYTES, Ids, TaskId, ids_of
from node.workers import journal as layout
from node.workers.journal import State
from node.workers.port import Mode
from oncekeeper.envelope import UNDECODABLE
from raft.commands import Fact, Testimony

MANIFEST = "manifest.json"
LOCK_POLL_S = 0.01

_FACTS = {
    State.NOT_STARTED: Fact.NEVER_STARTED,
    State.STARTED: Fact.STARTED,
    State.FINISHED: Fact.FINISHED,
    State.FAILED: Fact.FAILED,
}
# Of two records of one claim the graver counts: what is finished took effect, whatever else was tried.
_GRAVITY = {Fact.NEVER_STARTED: 0, Fact.FAILED: 1, Fact.STARTED: 2, Fact.FINISHED: 3}


class Manifest(msgspec.Struct, frozen=True):
    format: int
    incarnation: int
    boot_id: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Evidence:
    """``complete``: a claim of that incarnation that no fact names was never handed to a worker."""

    complete: bool
    facts: tuple[Testimony, ...]
    why: str = ""  # what is missing, if not complete


class Unsound(Exception):
    """A journal that cannot be read in full."""


def write_manifest(directory: Path, incarnation: int, boot_id: str, files: tuple[str, ...]) -> None:
    """The promise that these are all the journals there are."""
    text = msgspec.json.encode(Manifest(1, incarnation, boot_id, files))
    draft = directory / (MANIFEST + ".draft")
    draft.write_bytes(text)
    draft.rename(directory / MANIFEST)


def incarnations(work_dir: Path) -> tuple[int, ...]:
    """Whose journals are kept, ascending."""
    if not work_dir.is_dir():
        return ()
    return tuple(sorted(int(entry.name) for entry in work_dir.iterdir() if entry.name.isdecimal()))


def forget(work_dir: Path, incarnation: int) -> None:
    """Delete the journals of an incarnation of which no claim and no suspect is left in the ledger."""
    shutil.rmtree(work_dir / str(incarnation), ignore_errors=True)


def read_testimony(work_dir: Path, incarnation: int, wait_s: float = 10.0) -> Evidence:
    """What the journals of a former incarnation of this node say.

    Blocks, up to ``wait_s``, for that incarnation's workers to be gone (they die with their parent).
    """
    directory = work_dir / str(incarnation)
    try:
        manifest = msgspec.json.decode((directory / MANIFEST).read_bytes(), type=Manifest)
    except FileNotFoundError:
        return Evidence(False, (), f"{directory / MANIFEST} is missing")
    except UNDECODABLE as error:
        return Evidence(False, (), f"{directory / MANIFEST} is damaged: {error}")
    if manifest.format != 1 or manifest.incarnation != incarnation:
        return Evidence(False, (), f"{directory / MANIFEST} is not format 1 of incarnation {incarnation}")
    deadline = time.monotonic() + wait_s
    return weigh(manifest, layout.read_boot_id(), lambda name: _read_file(directory / name, deadline))


def weigh(manifest: Manifest, boot_id: str, read: Callable[[str], bytes]) -> Evidence:
    """What the journals that the manifest names prove; ``read`` raises OSError or Unsound."""
    if manifest.boot_id != boot_id:
        return Evidence(False, (), "the machine was restarted since: unsynced marks prove nothing")
    missing: list[str] = []
    found: list[tuple[int, Ids, bytes]] = []
    for name in manifest.files:
        try:
            found.extend(_records(name, read(name), manifest, missing))
        except (Unsound, OSError) as error:
            # The rest of this file is lost as evidence; what the other files say still stands.
            missing.append(f"{name}: {error}")
    facts = _merge(found)
    if missing:
        facts = [fact for fact in facts if fact.fact is not Fact.NEVER_STARTED]
    return Evidence(not missing, tuple(facts), "; ".join(missing))


def _read_file(path: Path, deadline: float) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _await_lock(fd, deadline)
        return os.pread(fd, os.fstat(fd).st_size, 0)
    finally:
        os.close(fd)


def _records(name: str, data: bytes, manifest: Manifest, missing: list[str]) -> list[tuple[int, Ids, bytes]]:
    header = layout.pack_header(len(data), manifest.incarnation, manifest.boot_id)
    if len(data) < layout.DATA_AT or data[: len(header)] != header:
        raise Unsound("the header is damaged")
    if data[layout.LOSSY_AT]:
        missing.append(f"{name}: records were dropped for want of room")
    found = []
    for entry in range(layout.ENTRY_COUNT):
        at = layout.ENTRIES_AT + layout.ENTRY_BYTES * entry
        if data[at : at + 8] == bytes(8):
            continue
        try:
            record = _read_entry(data, at + 8)
        except Unsound as error:
            missing.append(f"{name}: entry {entry}: {error}")
            continue
        if record is not None:
            found.append(record)
    return found


def _await_lock(fd: int, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise Unsound("a worker of that incarnation is still running") from None
            time.sleep(LOCK_POLL_S)
        else:
            return


def _read_entry(data: bytes, at: int) -> tuple[int, Ids, bytes] | None:
    fence, mode, data_at, runs, keys, count, crc = layout.ENTRY.unpack_from(data, at)
    keys_at = data_at + layout.RUN.size * runs
    states_at = keys_at + KEY_BYTES * keys
    if data_at < layout.DATA_AT or states_at + count > len(data):
        raise Unsound("it points outside of the file")
    if crc != layout.entry_crc(fence, mode, data_at, runs, keys, count, data[data_at:states_at]):
        raise Unsound("its checksum does not match")
    states = data[states_at : states_at + count]
    if states and max(states) > State.FAILED:
        raise Unsound("a state byte is out of range")
    if mode != Mode.RUN:
        return None  # checks and validations take no effect: nothing to testify
    ids = Ids(
        tuple(layout.RUN.iter_unpack(data[data_at:keys_at])),
        tuple(data[key : key + KEY_BYTES] for key in range(keys_at, states_at, KEY_BYTES)),
    )
    # The sum and not len(), which cannot count beyond 2**63.
    if sum(length for _, length in ids.runs) + keys != count:
        raise Unsound(f"it names other than its {count} tasks")
    return fence, ids, states


def _merge(found: list[tuple[int, Ids, bytes]]) -> list[Testimony]:
    """One fact for each claimed id; ids of one fence and one fact gathered."""
    facts: dict[int, dict[TaskId, Fact]] = {}
    for fence, ids, states in found:
        known = facts.setdefault(fence, {})
        for task_id, state in zip(ids, states, strict=True):
            fact = _FACTS[State(state)]
            before = known.get(task_id)
            if before is None or _GRAVITY[fact] > _GRAVITY[before]:
                known[task_id] = fact
    return [
        Testimony(fence, ids_of(task_ids), fact)
        for fence in sorted(facts)
        for fact, task_ids in _by_fact(facts[fence])
    ]


def _by_fact(known: dict[TaskId, Fact]) -> Iterator[tuple[Fact, list[TaskId]]]:
    for fact in Fact:
        task_ids = [task_id for task_id, its in known.items() if its is fact]
        if task_ids:
            yield fact, sorted(task_ids, key=lambda one: (isinstance(one, bytes), one))
