"""The task log as the loop uses it: reads at once, writes in a thread of their own.

A read is one range scan of pages that were just written, some tens of microseconds: handing it to a thread
would cost more than it takes. A write waits for the disk and for the locks of other processes, so it never
happens on the loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from node.parts import DelayIndexPart, GroupPart
from oncekeeper.log.port import TaskLog

T = TypeVar("T")


class LogThread:
    """``reader`` belongs to the loop; ``run`` uses another handle, in the thread."""

    def __init__(self, open_log: Callable[[], TaskLog]) -> None:
        self.reader = open_log()
        self._writer = open_log()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="log")

    group: GroupPart | None = None
    delay_index: DelayIndexPart | None = None

    async def run(self, work: Callable[[TaskLog], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work, self._writer)

    async def look(self, work: Callable[[TaskLog], T]) -> T:
        return await self.run(work)

    def close(self) -> None:
        self._executor.shutdown(wait=True)
        self._writer.close()
        self.reader.close()
