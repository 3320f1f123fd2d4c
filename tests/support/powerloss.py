"""Power loss for real processes: record what they do to their files, then rebuild what a power loss would leave.

    recorder = PowerLossRecorder(data_directory, scratch)    # compiles powerloss.c; the data directory must exist
    process = subprocess.Popen(command, env=recorder.env())  # with all its children; any number of processes
    ...                                                      # kill them all (SIGKILL) before rebuilding
    recording = recorder.recording()
    recording.rebuild(target, seed=7)                        # power failed at the end of the recording
    recording.rebuild(target, seed=7, upto=1200)             # or after its first 1200 events

To run the rebuilt directory on, move it to where the first one was and make a new recorder: what that finds is
taken to be durable. What the outside was told by a moment: note ``time.monotonic_ns()`` after hearing it, and
rebuild ``upto=at_time(...)`` that; or let the process write it to a file below the directory (no sync needed), and
read ``written(path, upto)``.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from struct import Struct

from tests.support.powerloss_disk import Disk, Loss, Truncate, Write

SOURCE = Path(__file__).with_suffix(".c")
_EVENT = Struct("<6I5Q")
_MAGIC = 0x534C5750

FileId = tuple[int, int]
"""Inode number and birth time."""


class Kind(IntEnum):
    """As in powerloss.c."""

    CREATE = 1
    WRITE = 2
    TRUNCATE = 3
    RENAME = 4
    UNLINK = 5
    LINK = 6
    SYNC_BEGIN = 7
    SYNC_END = 8
    MKDIR = 9
    SYNC_ALL_BEGIN = 10
    SYNC_ALL_END = 11


@dataclass(frozen=True, slots=True)
class Event:
    kind: Kind
    pid: int
    file: FileId
    path: str
    path2: str
    offset: int  # of a write; the size of a truncation; the number of a sync
    data: bytes
    stamp_ns: int


class NoCompiler(RuntimeError):
    """These tests prove durability, so a machine that cannot run them must say so and not pass."""


def build_library(scratch: Path) -> Path:
    library = scratch / "powerloss.so"
    if library.exists():
        return library
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise NoCompiler("no C compiler (cc) was found; power-loss tests need one: apt-get install gcc")
    part = scratch / f"powerloss.{os.getpid()}.so"
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(part), str(SOURCE), "-ldl", "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoCompiler(f"{' '.join(command)} failed:\n{done.stderr}")
    part.rename(library)
    return library


class PowerLossRecorder:
    """Records from now on. ``directory`` holds what is durable at the start; ``scratch`` must lie outside of it."""

    def __init__(self, directory: Path, scratch: Path) -> None:
        self.directory = directory.resolve()
        scratch.mkdir(parents=True, exist_ok=True)
        self._library = build_library(scratch)
        number = sum(1 for _ in scratch.glob("recording-*"))
        self.log_path = scratch / f"recording-{number}"
        self.log_path.touch()
        self._base = [
            (str(path), _file_id(path), path.read_bytes())
            for path in sorted(self.directory.rglob("*"))
            if path.is_file() and not path.is_symlink()
        ]
        self._folders = {str(path) for path in self.directory.rglob("*") if path.is_dir()}

    def env(self, base: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment for a process that is to be recorded, and for its children."""
        env = dict(os.environ if base is None else base)
        env["LD_PRELOAD"] = " ".join(filter(None, [str(self._library), env.get("LD_PRELOAD")]))
        env["POWERLOSS_DIR"] = str(self.directory)
        env["POWERLOSS_LOG"] = str(self.log_path)
        return env

    def recording(self) -> Recording:
        return Recording(self.directory, self._base, self._folders, list(_read(self.log_path.read_bytes())))


def _file_id(path: Path) -> FileId:
    """As powerloss.c sees it: by statx, which Python lacks."""
    text = subprocess.run(["stat", "-c", "%i %.9W", path], capture_output=True, text=True, check=True).stdout
    inode, born = text.split()
    seconds, _, fraction = born.partition(".")
    return int(inode), int(seconds) * 1_000_000_000 + int(fraction or 0)


def _read(data: bytes) -> Iterator[Event]:
    """The events in order, without those whose process was killed while it wrote a long one to the recording."""
    event: Event | None = None
    start = at = 0
    while at + _EVENT.size <= len(data):
        if _EVENT.unpack_from(data, at)[0] != _MAGIC:
            # The event before is short, so its end was taken from the next one: that call never returned.
            at = data.find(_MAGIC.to_bytes(4, "little"), start + 1)
            if at < 0:
                return
            event = None
        if event is not None:
            yield event
        start = at
        event, at = _decode(data, at)
    if event is not None and at <= len(data):
        yield event


def _decode(data: bytes, at: int) -> tuple[Event, int]:
    fields = _EVENT.unpack_from(data, at)
    _, kind, pid, path_bytes, path2_bytes, _, inode, born, offset, data_bytes, stamp = fields
    path_at = at + _EVENT.size
    path2_at = path_at + path_bytes
    data_at = path2_at + path2_bytes
    end = data_at + data_bytes
    path, path2 = data[path_at:path2_at].decode(), data[path2_at:data_at].decode()
    return Event(Kind(kind), pid, (inode, born), path, path2, offset, data[data_at:end], stamp), end


def _is_volatile(path: str) -> bool:
    """SQLite's index of its write-ahead log is shared memory; SQLite builds it anew."""
    return path.endswith("-shm")


@dataclass
class Recording:
    """What happened below ``directory``, in one order for all processes."""

    directory: Path
    base: list[tuple[str, FileId, bytes]]
    folders: set[str]
    events: list[Event]
    _disk_at: int = -1
    _replay: _Replay | None = field(default=None, repr=False)

    def rebuild(
        self,
        target: Path,
        *,
        seed: int = 0,
        loss: Loss = Loss.RANDOM,
        upto: int | None = None,
        keep: Callable[[str], bool] = lambda path: True,
    ) -> Path:
        """Write what a power loss after the first ``upto`` events leaves to ``target``, which must not exist.

        Directories that were made stay made; symbolic links are not copied; files get mode 0600.
        Passing rising values of ``upto`` is cheap; a falling one replays from the start.
        """
        target.mkdir(parents=True)
        replay = self._at(upto)
        for folder in sorted(replay.folders):
            (target / os.path.relpath(folder, self.directory)).mkdir(parents=True, exist_ok=True)
        for path, content in replay.disk.after_power_loss(loss, seed).items():
            if _is_volatile(path) or not keep(path):
                continue
            place = target / os.path.relpath(path, self.directory)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
            place.chmod(0o600)
        return target

    def written(self, path: Path, upto: int | None = None) -> bytes:
        """What a living process would have read in the file after the first ``upto`` events."""
        disk = self._at(upto).disk
        key = disk.names.get(str(path.resolve()))
        return b"" if key is None else bytes(disk.file(key).content())

    def at_time(self, monotonic_ns: int) -> int:
        """The value for ``upto`` that takes in all that was done by then (``time.monotonic_ns``)."""
        return 1 + max(
            (n for n, event in enumerate(self.events) if event.stamp_ns <= monotonic_ns), default=-1
        )

    def moments(self, count: int, seed: int) -> list[int]:
        """Some values for ``upto``, rising: random ones, and the end."""
        rng = random.Random(seed)
        return sorted({*(rng.randrange(len(self.events) + 1) for _ in range(count - 1)), len(self.events)})

    def _at(self, upto: int | None) -> _Replay:
        upto = len(self.events) if upto is None else upto
        if self._replay is None or upto < self._disk_at:
            self._replay, self._disk_at = _Replay(self), 0
        for event in self.events[self._disk_at : upto]:
            self._replay.take(event)
        self._disk_at = upto
        return self._replay


class _Replay:
    """The disk as the events make it."""

    def __init__(self, recording: Recording) -> None:
        self.disk = Disk()
        self.folders = set(recording.folders)
        for path, file, content in recording.base:
            self.disk.add_durable(path, file, content)
        # (pid, sync number) -> how much that sync covers: fixed when it begins.
        self._begun: dict[tuple[int, int], int] = {}
        self._all_begun: dict[tuple[int, int], tuple[dict[FileId, int], int]] = {}

    def take(self, event: Event) -> None:
        disk, file = self.disk, event.file
        match event.kind:
            case Kind.WRITE:
                disk.file(file).add(Write(event.offset, event.data))
            case Kind.TRUNCATE:
                disk.file(file).add(Truncate(event.offset))
            case Kind.CREATE | Kind.LINK:
                disk.file(file)
                disk.change_names({event.path: file})
            case Kind.RENAME:
                self._rename(event)
            case Kind.UNLINK:
                self.folders.discard(event.path)
                if event.path in disk.names:
                    disk.change_names({event.path: None})
            case Kind.MKDIR:
                self.folders.add(event.path)
            case Kind.SYNC_BEGIN:
                covered = disk.name_changes_total if event.path else disk.file(file).changes_total
                self._begun[event.pid, event.offset] = covered
            case Kind.SYNC_END:
                covered = self._begun.pop((event.pid, event.offset))
                if event.path:
                    disk.sync_directory(event.path, covered)
                else:
                    disk.file(file).sync(covered)
            case Kind.SYNC_ALL_BEGIN:
                counts = {key: state.changes_total for key, state in disk.files.items()}
                self._all_begun[event.pid, event.offset] = (counts, disk.name_changes_total)  # type: ignore[assignment]
            case Kind.SYNC_ALL_END:
                counts_then, names_then = self._all_begun.pop((event.pid, event.offset))
                for key, count in counts_then.items():
                    disk.file(key).sync(count)
                for folder in {path.rpartition("/")[0] for path in disk.names} | self.folders:
                    disk.sync_directory(folder, names_then)

    def _rename(self, event: Event) -> None:
        source, target = event.path, event.path2
        if source not in self.folders:
            self.disk.change_names({source: None, target: event.file})
            return
        # A folder and all in it, as one change of names.
        moved: dict[str, FileId | None] = {}
        for path, key in self.disk.names.items():
            if path.startswith(f"{source}/"):
                moved[path] = None
                moved[target + path[len(source) :]] = key  # type: ignore[assignment]
        self.folders = {
            target + path[len(source) :] if path == source or path.startswith(f"{source}/") else path
            for path in self.folders
        }
        self.disk.change_names(moved)  # type: ignore[arg-type]
