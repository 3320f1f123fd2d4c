"""Work on the task log that is tried until it is done: a full disk delays what waits for it, and loses nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TypeVar

from node.parts import LogPart
from oncekeeper.errors import LogUnusable
from oncekeeper.log.port import TaskLog, UnknownAppend, Unsent

T = TypeVar("T")

_log = logging.getLogger("oncekeeper.node")

DISK_RETRY_MS = 500


class PatientLog:
    def __init__(self, log: LogPart, notes: dict[str, str]) -> None:
        """``notes``: what people are told of the node; says here why something waits."""
        self._log = log
        self._notes = notes

    async def run(self, work: Callable[[TaskLog], T]) -> T:
        """In the log's thread, and until it is done: ``work`` must bear to be repeated."""
        while True:
            try:
                result = await self._log.run(work)
            except (Unsent, UnknownAppend, LogUnusable) as error:
                self._notes["log"] = f"the task log cannot be written: {error}"
                _log.error("%s; trying again", self._notes["log"])
                await asyncio.sleep(DISK_RETRY_MS / 1000)
            else:
                self._notes.pop("log", None)
                return result
