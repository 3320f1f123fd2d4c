"""A member of a consumer group as a node's loop uses it: reads on from where each partition was assigned."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

from dedup.ids import Ids, TaskId
from oncekeeper.envelope import TaskBatch
from oncekeeper.log.kafka_codec import messages
from oncekeeper.log.kafka_group import Group
from oncekeeper.log.kafka_names import Names
from oncekeeper.log.port import Fetched, Gap

DEADLINE_S = 60.0


class Member:
    """``seen``: (partition, offset, id) of every task, in the order of reading; an assignment begins anew."""

    def __init__(self, bootstrap: str, prefix: str, **options: Any) -> None:
        settings = {"bootstrap.servers": bootstrap, **options.pop("settings", {})}
        self.group = Group(settings, Names(prefix), **options)
        self.seen: list[tuple[int, int, TaskId]] = []
        self.gaps: list[Gap] = []
        self.at: dict[int, int] = {}
        self.assignments: list[dict[int, int]] = []
        self._news = asyncio.Event()
        self.group.listen(self._changed, lambda _: self._news.set())

    def _changed(self) -> None:
        positions = dict(self.group.positions)
        self.assignments.append(positions)
        self.at = {number: self.at.get(number, at) for number, at in positions.items()}
        self._news.set()

    def read(self) -> bool:
        """Once from each partition; whether anything came."""
        came = False
        for number, at in list(self.at.items()):
            for item in self.group.read(number, at, 1000, 1 << 20):
                came = True
                assert item.base == self.at[number], f"{item.base} follows {self.at[number]}"
                self.at[number] = item.end
                if isinstance(item, Fetched):
                    self.seen += [
                        (number, item.base + n, task_id) for n, task_id in enumerate(item.batch.ids)
                    ]
                elif isinstance(item, Gap):
                    self.gaps.append(item)
        return came

    async def until(self, condition: Callable[[], object], what: str) -> None:
        """Read on until the condition holds."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, f"not within {DEADLINE_S} s: {what}; {self.group.trouble}"
            if self.read():
                await asyncio.sleep(0)
                continue
            self._news.clear()
            try:
                async with asyncio.timeout(0.05):
                    await self._news.wait()
            except TimeoutError:
                continue


@asynccontextmanager
async def member(bootstrap: str, prefix: str, **options: Any) -> AsyncIterator[Member]:
    """Joined, and left at the end."""
    found = Member(bootstrap, prefix, **options)
    found.group.want(True)
    try:
        yield found
    finally:
        found.group.want(False)
        await asyncio.to_thread(found.group.close, 20.0)


def task_values(ids: Iterable[int], queue: str = "default") -> list[bytes]:
    """A record's value for each id."""
    values = []
    for each in ids:
        batch = TaskBatch(queue=queue, handler="t.h", ids=Ids(((each, 1),)), bodies=(b'{"n":%d}' % each,))
        values += [value for _, value in messages(batch)]
    return values
