"""A task log that is elsewhere (Kafka), as the loop uses it: buffers to read from, threads for all else.

The handles are opened when they are first used, and again after they failed: a node votes, answers and keeps its
session while the log cannot be reached.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import msgspec

from node.parts import DelayIndexPart, GroupPart
from oncekeeper.errors import LogUnusable
from oncekeeper.log.delayed import DelayReads
from oncekeeper.log.opening import LogPlugin, Place
from oncekeeper.log.port import Item, TaskLog, UnknownAppend

T = TypeVar("T")


class GroupReader:
    """The partitions that are ours, out of the group's buffers; and all delayed tasks, out of their index."""

    def __init__(self, group: Any, partitions: int, delays: DelayReads | None) -> None:
        self._group = group
        self._partitions = partitions
        self.delays = delays
        """None: the log keeps none."""

    @property
    def partitions(self) -> int:
        return self._partitions

    def read(self, partition: int, offset: int, tasks_max: int, bytes_max: int) -> list[Item]:
        items: list[Item] = self._group.read(partition, offset, tasks_max, bytes_max)
        return items

    def committed(self) -> dict[int, int]:
        return dict(self._group.positions)


class _Handle:
    """One thread, and the log as it has it open.

    A log that cannot be reached takes seconds to say so, and says it once: who stood in line meanwhile is told the
    same, and does not find it out anew. Without that the line would grow for as long as the log is away.
    """

    def __init__(self, name: str, open_log: Callable[[], TaskLog]) -> None:
        self._open = open_log
        self._log: TaskLog | None = None
        self._failed_s = 0.0
        self._why = ""
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    async def run(self, work: Callable[[TaskLog], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(
            self._executor, self._work, work, time.monotonic()
        )

    def _work(self, work: Callable[[TaskLog], T], asked_s: float) -> T:
        if asked_s < self._failed_s:
            raise LogUnusable(f"not tried, because the log was out of reach a moment ago: {self._why}")
        try:
            if self._log is None:
                self._log = self._open()
            return work(self._log)
        except (LogUnusable, UnknownAppend) as error:
            self._failed_s, self._why = time.monotonic(), str(error)
            raise

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
        if self._log is not None:
            self._log.close()


class _Committing:
    """A TaskLog whose positions are the group's to commit: only a member may, and only its own partitions."""

    def __init__(self, log: TaskLog, group: Any) -> None:
        self._log = log
        self._group = group

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    def commit(self, positions: Mapping[int, int]) -> None:
        self._group.commit(positions)


def _indexed(place: Place, name: str) -> Place:
    if place.index_dir is None:
        return place
    return msgspec.structs.replace(place, index_dir=place.index_dir / name)


class FollowedIndex:
    """DelayIndexPart over a follower of the log's delayed tasks."""

    def __init__(self, follower: Any, group: GroupPart, look: Callable[[Callable[[Any], None]], Any]) -> None:
        self._follower = follower
        self._group = group
        self._look = look

    def expect(self) -> None:
        self._follower.expect_current()

    async def see(self, within_s: float) -> None:
        try:
            async with asyncio.timeout(within_s):
                await self._look(lambda log: log.delays.catch_up(within_s))
        except (LogUnusable, TimeoutError):
            self.expect()

    def watch(self, on_change: Callable[[frozenset[int]], None]) -> None:
        loop = asyncio.get_running_loop()

        def tell(partitions: frozenset[int]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process is leaving
                loop.call_soon_threadsafe(told, partitions)

        def told(partitions: frozenset[int]) -> None:
            if ours := partitions & self._group.positions.keys():
                on_change(ours)

        self._follower.on_change = tell


class GroupLog:
    """LogPart (node/parts.py) over a plugin that has a group."""

    def __init__(self, plugin: LogPlugin, place: Place) -> None:
        group = plugin.group(place)
        if group is None:
            raise LogUnusable(f"log={place.url!r} has no group that assigns partitions")
        self._member = group
        self.group: GroupPart = group
        # One follower for all handles: it writes the index, and they read it.
        follow = getattr(plugin, "delays", None)
        self._follower: Any = follow(place) if follow is not None else None
        self._delays = self._follower.reads() if self._follower is not None else None
        self.reader = GroupReader(group, place.partitions, self._delays)
        # One reads and one writes: a search through the log must not keep dead letters and commits waiting.
        # Each has an index of its own, because a handle is one thread's.
        writing, looking = (_indexed(place, name) for name in ("log", "look"))
        self._writer = _Handle(
            "log", lambda: cast(TaskLog, _Committing(self._keeping(plugin.open(writing, create=True)), group))
        )
        self._looker = _Handle("look", lambda: self._keeping(plugin.open(looking, create=False)))
        self.delay_index: DelayIndexPart | None = None
        if self._follower is not None:
            self.delay_index = FollowedIndex(self._follower, group, self.look)
            self._follower.start()

    def _keeping(self, log: Any) -> Any:
        if self._follower is not None:
            log.keep_delayed(self._follower)
        return log

    async def run(self, work: Callable[[TaskLog], T]) -> T:
        return await self._writer.run(work)

    async def look(self, work: Callable[[TaskLog], T]) -> T:
        return await self._looker.run(work)

    def close(self) -> None:
        self._member.close()
        self._writer.close()
        self._looker.close()
        if self._delays is not None:
            self._delays.close()
        if self._follower is not None:
            self._follower.close()
