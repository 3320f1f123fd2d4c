"""Real clusters whose task log is on a real broker, and load that goes on while the broker does not.

The log is looked at past whatever stands between broker and cluster: the history is of what Kafka holds.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self, cast

import msgspec

from chaos import history as h
from dedup.ids import Ids, TaskId, keyed_id
from node.cli.output import CliError
from node.kafkaup.broker import Kafka
from oncekeeper.errors import ClusterUnreachable, LogUnusable, OncekeeperError, SubmitFailed, UnknownSubmit
from oncekeeper.log.kafka import KafkaLog, open_kafka
from oncekeeper.log.port import Fetched
from raft.commands import Claim, Command
from tests.support.kafka_broker import delete_topics, produce, unique_prefix
from tests.support.real_cluster import POLICIES, RealCluster, eventually

HANDLERS = ("once", "reckon", "drift")
PARTITIONS = 6
PROGRESS_S = 60.0  # on a machine that is busy with other things, with a group that has to find itself again
# A broker lets a member go that it has not heard of for so long.
GROUP_SESSION = {"group.consumer.session.timeout.ms": "3000"}


class KafkaCluster(RealCluster):
    def __init__(
        self, folder: Path, servers: str, *, direct: str = "", prefix: str = "", **options: Any
    ) -> None:
        """``servers``: as the cluster and its clients dial them; ``direct``: as we do, who look at the log."""
        self.prefix = prefix or unique_prefix()
        self.direct = direct or servers
        wanted = {"log": f"kafka://{servers}/{self.prefix}", "partitions": PARTITIONS, "kafka_replication": 1}
        wanted |= options.pop("log_settings", {})
        super().__init__(folder, log_settings=wanted, **options)
        self._watched: KafkaLog | None = None
        self._looking = threading.Lock()
        self._highest: dict[int, int] = {}
        made = {"partitions": wanted["partitions"], "replication": wanted["kafka_replication"]}
        self.open_log(create=True, **made).close()

    def __enter__(self) -> Self:
        return self

    @property
    def topic(self) -> str:
        return f"{self.prefix}.q.default"

    def open_log(self, **options: Any) -> KafkaLog:
        return open_kafka(
            f"kafka://{self.direct}/{self.prefix}", cluster_id=self.cluster.cluster_id, **options
        )

    def pause(self, node: str) -> None:
        self._processes[node].send_signal(19)  # SIGSTOP; there is no file that others wait for

    @property
    def witness(self) -> Path:
        """What every node asked of the ledger and heard, if the setting ``record_history`` is this."""
        return self.home / "witness.jsonl"

    def asked(self) -> Counter[TaskId]:
        """How often each id stood in a claim, whatever the answer was. For nodes with a witness."""
        found: Counter[TaskId] = Counter()
        with self.witness.open("rb") as lines:
            for line in lines:
                call = msgspec.json.decode(line, type=_Call)
                if call.kind == "call" and isinstance(call.command, Claim):
                    found.update(call.command.ids)
        return found

    def content(self) -> dict[TaskId, bytes]:
        """The body of each task that the log holds now."""
        found: dict[TaskId, bytes] = {}
        log = self.open_log()
        try:
            for number, end in log.ends().items():
                at = 0
                while at < end and (items := log.read(number, at, 10_000, 64 << 20)):
                    for item in items:
                        if isinstance(item, Fetched):
                            found |= dict(zip(item.batch.ids, item.batch.bodies, strict=True))
                        at = item.end
        finally:
            log.close()
        return found

    def committed(self) -> dict[int, int]:
        log = self.open_log()
        try:
            return log.committed()
        finally:
            log.close()

    # --- positions ------------------------------------------------------------------------------------------

    def _watch_positions(self) -> None:
        while not self._watching.wait(0.25):
            self._look_at_positions()

    def _look_at_positions(self) -> None:
        with self._looking:
            try:
                if self._watched is None:
                    self._watched = self.open_log()
                positions = self._watched.committed()
            except LogUnusable:
                return  # the broker is away: the next look sees
            # The highest that was ever seen must pass nothing open, which is more than is asked of the last one.
            # That no lower one follows it, Kafka cannot promise: the commit of a member that is in the group still
            # may arrive when the partition is another's already, who began below it.
            for number, at in positions.items():
                self._highest[number] = max(at, self._highest.get(number, 0))
            self.history.positions += [h.Position(number, at) for number, at in self._highest.items()]

    def _stop_watching(self) -> None:
        super()._stop_watching()
        if self._watched is not None:
            self._watched.close()
            self._watched = None

    def rewound(self) -> None:
        """A person did it: what was seen of the positions before says nothing of those to come."""
        with self._looking:
            self._highest.clear()
            self.history.positions.clear()

    # --- work -----------------------------------------------------------------------------------------------

    def submit_surely(
        self, handler: str, count: int, told: list[tuple[OncekeeperError, float]], gone: threading.Event
    ) -> Ids | None:
        """The same ids until it is known that they are stored, or until nobody wants it any more.

        ``told`` is given every failure, and after how many seconds it came.
        """
        bodies = [json.dumps({"name": self.name()}).encode() for _ in range(count)]
        ids: Ids | None = None
        while True:
            began = time.monotonic()
            try:
                ids = self.client.send(f"real.{handler}", bodies, ids=ids)
            except UnknownSubmit as error:
                told.append((error, time.monotonic() - began))
                ids = cast(Ids, error.ids)
                self.history.submit(ids, POLICIES.get(handler, "check"), acknowledged=False)
            except (SubmitFailed, ClusterUnreachable) as error:
                told.append((error, time.monotonic() - began))
            else:
                self.acknowledged(ids, handler)
                return ids
            if gone.wait(0.1):
                return None

    def produce(self, partition: int, count: int = 1, *, handler: str = "once", do: str = "") -> list[TaskId]:
        """Tasks without an id, as a client of any language sends them, to one partition of the default queue."""
        names = [self.name() for _ in range(count)]
        if do:
            for name in names:
                (self.home / "traps" / name).touch()
        bodies = [{"name": name, **({"do": do} if do else {})} for name in names]
        values = [json.dumps({"handler": f"real.{handler}", "body": body}).encode() for body in bodies]
        stored = produce(self.direct, self.topic, values, partition)
        ids: list[TaskId] = [
            keyed_id("kafka", f"{self.topic}/{each.partition()}/{each.offset()}") for each in stored
        ]
        self.acknowledged(ids, handler)
        self.keys.update(zip(ids, names, strict=True))
        return ids

    def progress(self, tasks: int = 100, seconds: float = PROGRESS_S) -> float:
        """Seconds until so many more effects are there."""
        began, since = time.monotonic(), len(self.sink.read())
        eventually(
            f"{tasks} effects more than {since}", lambda: len(self.sink.read()) >= since + tasks, seconds
        )
        return time.monotonic() - began

    def notes(self) -> dict[str, list[str]]:
        """What each node has to say to people."""
        found = {}
        for node in self.running():
            with suppress(CliError):
                found[node] = list(self.api(node).get("/v1/status", local=1)["notes"])
        return found

    def partitions(self, *nodes: str) -> list[dict[str, Any]]:
        """As the nodes (all that run) show them; empty while nobody can tell."""
        with suppress(CliError):
            return list(self.api(*nodes).get("/v1/status")["partitions"])
        return []

    def owners(self, *nodes: str) -> dict[int, str | None]:
        """Who says of each partition that it is its own."""
        return {row["partition"]: row["owner"] for row in self.partitions(*nodes)}

    def judge(self, load: Load) -> None:
        """Whole history, and each task of the load took effect once."""
        self.wait_up()
        self.check()
        names = [name for name, _, _ in self.sink.read()]
        assert len(names) == len(set(names)) >= load.tasks()


@contextmanager
def working(folder: Path, servers: str, *, witnessed: bool = False, **options: Any) -> Iterator[KafkaCluster]:
    """Nodes that take work. ``witnessed``: what they ask of the ledger is written down (``asked``)."""
    if witnessed:
        options["settings"] = {"record_history": str(folder / "home" / "witness.jsonl")}
    with KafkaCluster(folder, servers, **options) as cluster:
        cluster.start()
        cluster.wait_up()
        yield cluster


@contextmanager
def working_on(kafka: Kafka, folder: Path) -> Iterator[KafkaCluster]:
    """The same on a broker that others use, too: its topics are deleted at the end."""
    with working(folder, kafka.bootstrap(), witnessed=True) as cluster:
        yield cluster
    delete_topics(kafka.bootstrap(), cluster.prefix)


class _Call(msgspec.Struct, frozen=True):
    kind: str
    command: Command | None = None


class Load:
    """Tasks submitted in the background, in steady batches, until the block ends."""

    def __init__(self, cluster: KafkaCluster, batch: int = 20, pause_s: float = 0.05) -> None:
        self._cluster, self._batch, self._pause_s = cluster, batch, pause_s
        self._end, self._gone = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._error: Exception | None = None
        self.ids: list[Ids] = []
        """Acknowledged."""
        self.told: list[tuple[OncekeeperError, float]] = []
        """Failures, and after how many seconds each came."""

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(30)  # what is under way shall be known to be stored
        self._gone.set()
        self._thread.join(30)
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            number = 0
            while not self._end.wait(self._pause_s):
                handler = HANDLERS[number % len(HANDLERS)]
                ids = self._cluster.submit_surely(handler, self._batch, self.told, self._gone)
                if ids is not None:
                    self.ids.append(ids)
                number += 1
        except Exception as error:  # noqa: BLE001  # raised again by the block's end
            self._error = error

    def tasks(self) -> int:
        return sum(len(some) for some in list(self.ids))

    def reached(self, tasks: int) -> bool:
        return self.tasks() >= tasks
