"""A node for the HTTP layer's tests: a real ledger, a log in memory, real records, and peers that are told.

``run`` serves a coroutine with a started server and a client session; every test is one such coroutine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

from dedup.ids import Ids, TaskId, ids_of
from node.config import Address
from node.facade import (
    LocalStatus,
    NodeIdentity,
    OutcomeUnknown,
    PartitionStatus,
    PeerAnswer,
    PeerUnreachable,
    Unavailable,
)
from node.http.server import HttpServer
from node.records import Records, recorded
from node.sweeper import Verdicts, append_again
from node.workers.port import HandlerInfo
from oncekeeper.envelope import TaskBatch
from oncekeeper.log.memory import MemoryLog
from oncekeeper.log.port import Appended, TaskLog
from raft.codec import encode_proposal
from raft.commands import (
    Answer,
    Answered,
    Claim,
    Command,
    Join,
    Joined,
    Proposal,
    Result,
    Settle,
    Settlement,
)
from raft.ledger import Ledger

T = TypeVar("T")
TOKEN = "a" * 64
PARTITIONS = 3
NOW_MS = 1_780_000_000_000


def handler(name: str, **changes: Any) -> HandlerInfo:
    fields: dict[str, Any] = {
        "kind": "io", "length": "short", "is_async": False, "ttr_ms": 30_000, "retries": 3, "retry_delay_ms": 100,
        "retry_delay_ms_max": 1000, "on_doubt": "check", "queue": "default",
    }  # fmt: skip
    return HandlerInfo(name=name, **(fields | changes))


class FakeNode:
    """NodeFacade. What a test wants to be otherwise, it sets."""

    def __init__(self, directory: Path, name: str = "n1", ledger: Ledger | None = None) -> None:
        self.name = name
        self.ledger = ledger or Ledger(1)
        self.log = MemoryLog(PARTITIONS, clock_ms=lambda: NOW_MS)
        self.records = Records.open(directory / f"{name}.db", clock_ms=lambda: NOW_MS)
        self.handlers: Mapping[str, HandlerInfo] = {"shop.charge": handler("shop.charge")}
        self.peers: dict[str, str] = {}
        self.stuck: set[int] = set()
        self.answers: dict[str, Callable[[str, str], Any]] = {}  # by peer: (method, path) -> body, or raises
        self.reports: dict[int, PartitionStatus] | None = None
        self.wrong_body: tuple[int, str] | None = None
        self.quorum = True
        self.unknown = False
        self.append_raises: Exception | None = None
        self.before_report: Callable[[], object] = lambda: None
        self._sequence = 0

    @property
    def identity(self) -> NodeIdentity:
        return NodeIdentity(
            self.name, "c" * 32, 1, "0.1.0", 4242, NOW_MS, "shop:app", "/srv", "/data", "embedded",
            PARTITIONS, "127.0.0.1:1", "127.0.0.1:2", 4000, 1000,
        )  # fmt: skip

    def local_status(self) -> LocalStatus:
        ends = self.log.ends()
        views = self.reports if self.reports is not None else {p: settled(p, end) for p, end in ends.items()}
        status = LocalStatus(
            node=self.name, incarnation=1, session=1, role="leader", leader=self.name, term=1,
            applied_index=self.ledger.applied_index, lease_left_ms=3000, takes_work=True, pid=4242,
            partitions=tuple(views.values()), running=0,
        )  # fmt: skip
        self.before_report()
        return status

    async def propose(self, commands: tuple[Command, ...], timeout_ms: int) -> tuple[Answer, ...]:
        if not self.quorum:
            raise Unavailable("no leader is known")
        answers = self.apply(*commands)
        if self.unknown:
            raise OutcomeUnknown("no answer came within 5000 ms")
        return answers

    def apply(self, *commands: Command) -> tuple[Answer, ...]:
        self._sequence += 1
        payload = encode_proposal(Proposal(7, self._sequence, commands))
        effects = self.ledger.apply(self.ledger.applied_index + 1, payload)
        self.records.add_events(recorded(effects, NOW_MS))
        return effects.answers

    async def barrier(self, timeout_ms: int) -> None:
        if not self.quorum:
            raise Unavailable("no leader is known")

    async def validate(self, handler: str, bodies: Sequence[bytes]) -> tuple[int, str] | None:
        return self.wrong_body

    async def append(self, batches: Sequence[TaskBatch]) -> list[Appended]:
        if self.append_raises is not None:
            raise self.append_raises
        return self.log.append(batches)

    async def with_log(self, work: Callable[[TaskLog], T]) -> T:
        return work(self.log)

    async def ask_peer(
        self, node: str, method: str, path: str, body: Any = None, *, timeout_ms: int = 1500
    ) -> PeerAnswer:
        if node not in self.answers:
            raise PeerUnreachable(f"node {node}: connection refused")
        return PeerAnswer(200, self.answers[node](method, path))

    def skip(self, partition: int) -> bool:
        return partition in self.stuck and not self.stuck.discard(partition)

    async def delays_changed(self, partitions: frozenset[int], timeout_ms: int) -> bool:
        return True

    async def wait_settled(self, task_id: TaskId, timeout_ms: int) -> bool:
        return self.ledger.describe(task_id).state in ("executed", "dead", "cancelled")

    # --- moving tasks about ---------------------------------------------------------------------------------------

    def join(self, node: str = "n2", incarnation: int = 1) -> int:
        (joined,) = self.apply(Join(node, incarnation, 4000))
        assert isinstance(joined, Joined)
        return joined.session

    def claim(self, session: int, ids: Ids) -> int:
        (answer,) = self.apply(Claim(session, ids))
        assert isinstance(answer, Answered)
        return answer.spans[0].fence

    def settle(self, session: int, ids: Ids, result: Result, delay_ms: int = 0) -> int:
        """Claim and settle; the fence."""
        fence = self.claim(session, ids)
        self.apply(Settle(session, (Settlement(fence, ids, result, delay_ms),)))
        return fence

    def sweep(self) -> None:
        """What node/sweeper.py does on the leader."""
        for kind in ("dead", "suspect"):
            page = [task for _, task in self.log.aside(kind, 0, 100)]
            again, drop = Verdicts(self.ledger).split(page)
            append_again(self.log, again, lambda partitions: None)
            self.log.drop_aside(drop)


def settled(partition: int, end: int, **counts: int) -> PartitionStatus:
    return PartitionStatus(partition, end, end, **counts)


def one(task_id: TaskId) -> Ids:
    return ids_of([task_id])


class Answer200:
    """Status and decoded JSON of an answer."""

    def __init__(self, status: int, body: Any, headers: Mapping[str, str]) -> None:
        self.status = status
        self.body = body
        self.headers = headers


class Caller:
    def __init__(self, session: aiohttp.ClientSession, port: int) -> None:
        self._session = session
        self.port = port

    async def get(self, path: str, **options: Any) -> Answer200:
        return await self.ask("GET", path, **options)

    async def post(self, path: str, body: Any = None, **options: Any) -> Answer200:
        if body is not None:
            options["json"] = body
        return await self.ask("POST", path, **options)

    async def ask(self, method: str, path: str, token: str | None = TOKEN, **options: Any) -> Answer200:
        headers = dict(options.pop("headers", {}))
        if token is not None:
            headers.setdefault("Authorization", f"Bearer {token}")
        url = f"http://127.0.0.1:{self.port}{path}"
        async with self._session.request(method, url, headers=headers, **options) as response:
            body = await response.json() if response.content_type == "application/json" else None
            return Answer200(response.status, body, response.headers)


def run(node: FakeNode, test: Callable[[Caller], Awaitable[None]]) -> None:
    async def serve() -> None:
        server = HttpServer(node, Address("127.0.0.1", 0), TOKEN)
        port = await server.start()
        try:
            async with aiohttp.ClientSession() as session:
                await test(Caller(session, port))
        finally:
            await server.stop()

    try:
        asyncio.run(asyncio.wait_for(serve(), 60))
    finally:
        node.records.close()
