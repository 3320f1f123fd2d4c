"""The application that the bench's nodes run. Its effects are bytes appended to files under BENCH_DIR.

A file that is opened for appending takes each small write whole, from however many processes, and it swallows
nothing: an effect that happened twice is there twice.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from pathlib import Path

from oncekeeper import App

app = App("bench")

EFFECTS = "effects"  # one little-endian u64 an effect: the task's number
STARTS = "starts"  # one START an effect
NUMBER = struct.Struct("<Q")
START = struct.Struct("<QQQ")  # number; CLOCK_MONOTONIC ns when it was submitted; and when it started

_files: dict[str, int] = {}


def home() -> Path:
    return Path(os.environ.get("BENCH_DIR", "."))


def _append(name: str, record: bytes) -> None:
    file = _files.get(name)
    if file is None:
        file = _files[name] = os.open(home() / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(file, record)


@app.task(kind="cpu", on_doubt="rerun")
def rerun(number: int) -> None:
    _append(EFFECTS, NUMBER.pack(number))


@app.task(kind="cpu", on_doubt="check")
def checked(number: int) -> None:
    _append(EFFECTS, NUMBER.pack(number))


@checked.check
def took_effect(number: int) -> bool:
    return find_effect(home() / EFFECTS, number)


@app.task(kind="io", on_doubt="rerun")
def threaded(number: int) -> None:
    _append(EFFECTS, NUMBER.pack(number))


@app.task(kind="io", on_doubt="rerun")
def start_io(number: int, sent_ns: int) -> None:
    _append(STARTS, START.pack(number, sent_ns, time.monotonic_ns()))


@app.task(kind="cpu", on_doubt="rerun")
def start_cpu(number: int, sent_ns: int) -> None:
    _append(STARTS, START.pack(number, sent_ns, time.monotonic_ns()))


def find_effect(path: Path, number: int) -> bool:
    """Whether the record of ``number`` stands in the file, at a place where a record can begin."""
    record = NUMBER.pack(number)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            at = content.find(record)
            while at >= 0 and at % NUMBER.size:
                at = content.find(record, at + 1)
            return at >= 0
    except (FileNotFoundError, ValueError):
        return False  # no file, or an empty one: nobody has had an effect yet
