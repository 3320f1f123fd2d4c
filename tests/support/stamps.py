"""When each task began, told by its handler: by a clock that nobody bends."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from struct import Struct

RECORD = Struct("<40sQIIQ")  # the id as text, the fence, the pid, the node's pid, CLOCK_BOOTTIME in ns


@dataclass(frozen=True)
class Stamp:
    id: str
    fence: int
    pid: int
    node_pid: int
    boot_ns: int


def boot_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def add_stamp(home: Path, task_id: str, fence: int, at_ns: int) -> None:
    with (home / "stamps").open("ab", buffering=0) as stamps:
        stamps.write(RECORD.pack(task_id.encode(), fence, os.getpid(), os.getppid(), at_ns))


def read_stamps(home: Path) -> list[Stamp]:
    try:
        data = (home / "stamps").read_bytes()
    except FileNotFoundError:
        return []
    whole = len(data) // RECORD.size * RECORD.size
    return [Stamp(name.rstrip(b"\0").decode(), *rest) for name, *rest in RECORD.iter_unpack(data[:whole])]
