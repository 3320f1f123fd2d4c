"""A node's own account of what it asked the ledger and what it heard, for the checkers of chaos/.

Off unless ``record_history`` names a file. One JSON line an event, in one write to a file opened for appending:
what was written before a SIGKILL stays. Times are CLOCK_BOOTTIME, which all processes of the machine share.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec

from raft.commands import Answered, Claim, Command, Effects, Settle


class Witness(Protocol):
    def called(self, commands: tuple[Command, ...]) -> int:
        """Before asking; the number to say with ``answered``."""
        ...

    def answered(self, op: int, effects: Effects) -> None: ...

    def applied(self, index: int, payload: bytes) -> None: ...

    def lease(self, session: int, until_ms: int) -> None: ...

    def committed(self, positions: Mapping[int, int]) -> None: ...


class NoWitness:
    def called(self, commands: tuple[Command, ...]) -> int:
        return 0

    def answered(self, op: int, effects: Effects) -> None:
        pass

    def applied(self, index: int, payload: bytes) -> None:
        pass

    def lease(self, session: int, until_ms: int) -> None:
        pass

    def committed(self, positions: Mapping[int, int]) -> None:
        pass


class FileWitness:
    def __init__(self, path: Path, node: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._process = f"{node}/{os.getpid()}"
        self._ops = itertools.count(1)
        self._encode = msgspec.json.Encoder().encode

    def called(self, commands: tuple[Command, ...]) -> int:
        op = 0
        for command in commands:
            if isinstance(command, Claim | Settle):
                op = op or next(self._ops)
                self._write(kind="call", op=op, command=command)
        return op

    def answered(self, op: int, effects: Effects) -> None:
        if not op:
            return
        for command, answer in zip(effects.proposal.commands, effects.answers, strict=True):
            if isinstance(command, Claim | Settle) and isinstance(answer, Answered):
                self._write(kind="return", op=op, index=effects.index, command=command, answer=answer)

    def applied(self, index: int, payload: bytes) -> None:
        # Whole: snapshots shorten the journals, and what was decided must still be told from the first entry on.
        self._write(kind="applied", index=index, payload=payload)

    def lease(self, session: int, until_ms: int) -> None:
        self._write(kind="lease", session=session, until_ms=until_ms)

    def committed(self, positions: Mapping[int, int]) -> None:
        self._write(kind="commit", positions=dict(positions))

    def _write(self, **line: Any) -> None:
        line |= {"t_ns": time.clock_gettime_ns(time.CLOCK_BOOTTIME), "process": self._process}
        # A disk that is full costs the account a line, and must not cost the node its life.
        with contextlib.suppress(OSError):
            os.write(self._file, self._encode(line) + b"\n")


def witness(path: str, node: str) -> Witness:
    return FileWitness(Path(path), node) if path else NoWitness()
