"""The client: submits tasks, and asks nodes about them.

With a cluster's data directory it writes the task log itself, durably, and wakes the nodes where the log is this
machine's; that works with all nodes down. With addresses it sends tasks to a node. Ids are fixed before the first
attempt to send, so sending again after an unknown outcome is safe: the cluster runs an id once.
"""

from __future__ import annotations

import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec

from dedup.ids import Ids, TaskId, id_text, keyed_id
from oncekeeper.cluster import Cluster, find_cluster, tls_context
from oncekeeper.dues import Delay, check_chosen, time_chosen
from oncekeeper.envelope import UNDECODABLE, TaskBatch, check_body, check_options, encode_task, time_text
from oncekeeper.errors import (
    ClusterUnreachable,
    InvalidTask,
    LogUnusable,
    NoCluster,
    Refused,
    ResultLost,
    ResultTimeout,
    SubmitFailed,
    TaskCancelled,
    TaskFailed,
    UnknownSubmit,
    UnknownTask,
)
from oncekeeper.handle import Handle, Handles, program
from oncekeeper.idsource import IdSource
from oncekeeper.log.opening import LogPlugin, plugin_of
from oncekeeper.log.port import TaskLog, UnknownAppend, Unsent

if TYPE_CHECKING:
    import httpx

TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 1.0
# A submit waits for this. A node that is stopped in its tracks still accepts connections; ids can be drawn instead.
IDS_TIMEOUT_S = 1.0
WAKE_PARTITIONS_MAX = 512  # named in one datagram
_POST_TASKS = 2000
_POST_BYTES = 2 * 1024 * 1024
_QUEUES_S = 60.0  # what the handlers' queues are is asked again after so long: applications change
_WAIT_S = 20.0  # the longest a node is asked to hold an answer back
_UNREACHABLE_S = 10.0  # how long ``result`` waits for a cluster that does not answer: an election, a restart
_PAUSE_S = 0.1
_RESCHEDULE_S = 20.0  # nodes that do not answer are waited for until their leases are over

_encode = msgspec.json.Encoder().encode
_abandoned: list[object] = []


class Client:
    """Safe for threads, and in a forked child. ``cluster``: see find_cluster. Nothing is opened before use."""

    def __init__(
        self,
        cluster: str | os.PathLike[str] | Cluster | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.cluster = cluster if isinstance(cluster, Cluster) else find_cluster(cluster)
        self._plugin: LogPlugin | None = None
        if self.cluster.log is not None:
            try:
                self._plugin = plugin_of(self.cluster.log.url)
            except LogUnusable as error:
                raise NoCluster(f"{self.cluster}: {error}") from error
        self._timeout_s = timeout_s
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()  # over the log and the making of connections
        self._log: TaskLog | None = None
        self._http: httpx.Client | None = None
        self._socket: socket.socket | None = None
        self._first = 0  # the address that answered last
        self._ids = IdSource(self._allocate)
        self._queues: dict[str, str] = {}
        self._queues_until = 0.0
        self._by = f"{socket.gethostname()}:{self._pid} {program()}"

    def _after_fork(self) -> None:
        """A child must not give out its parent's ids, nor use or close its connections (SQLite forbids it)."""
        if self._pid != os.getpid():
            _abandoned.extend((self._log, self._http, self._ids))
            self._start()

    def close(self) -> None:
        """Let go of files and connections. The client can be used again."""
        self._after_fork()
        with self._lock:
            for part in (self._log, self._http, self._socket):
                if part is not None:
                    part.close()
            self._log = self._http = self._socket = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- submitting -------------------------------------------------------------------------------------------

    def submit(
        self,
        handler: str,
        body: Mapping[str, Any] | bytes,
        *,
        key: str | None = None,
        queue: str | None = None,
        ttr: float | None = None,
        traceparent: str = "",
        delay: Delay | None = None,
        due: datetime | str | None = None,
        then: str | None = None,
    ) -> Handle[Any]:
        """Submit a task by its handler's name; the worker checks the body against the handler's types.

        ``queue``: None is the handler's own, for which a node is asked. ``delay``, ``due``, ``then``: as for
        ``Task.options``. Raises as ``send`` does.
        """
        check_chosen(delay, due, then)
        ids = self.send(
            handler,
            [body if isinstance(body, bytes) else _encode(body)],
            queue=self.queue_of(handler) if queue is None else queue,
            ttr_ms=0 if ttr is None else round(ttr * 1000),
            keys=() if key is None else (key,),
            traceparent=traceparent,
            due_ms=time_chosen(delay, due, self.wall_ms()),
            then=then or "",
        )
        return Handle(self, next(iter(ids)))

    def submit_many(
        self,
        handler: str,
        bodies: Iterable[Mapping[str, Any] | bytes],
        *,
        keys: Sequence[str] = (),
        queue: str | None = None,
        ttr: float | None = None,
        delay: Delay | None = None,
        due: datetime | str | None = None,
        then: str | None = None,
    ) -> Handles[Any]:
        """Submit tasks of one handler, all or none. ``queue``: None is the handler's own."""
        check_chosen(delay, due, then)
        texts = [body if isinstance(body, bytes) else _encode(body) for body in bodies]
        ids = self.send(
            handler,
            texts,
            queue=self.queue_of(handler) if queue is None else queue,
            ttr_ms=0 if ttr is None else round(ttr * 1000),
            keys=keys,
            due_ms=time_chosen(delay, due, self.wall_ms()),
            then=then or "",
        )
        return Handles(self, [ids])

    def queue_of(self, handler: str) -> str:
        """The queue that the application gives a handler. A key names a task within its queue: no guess will do.

        Raises InvalidTask for a handler that the application does not have, and ClusterUnreachable.
        """
        self._after_fork()
        check_options(handler, "default", 0, None)
        if handler not in self._queues or time.monotonic() > self._queues_until:
            answer = self.request("GET", "/v1/handlers")
            self._queues = {str(each["name"]): str(each["queue"]) for each in answer["handlers"]}
            self._queues_until = time.monotonic() + _QUEUES_S
            if not answer["app"]:
                return "default"  # that node runs no application, and cannot know
            if not self._queues:
                raise ClusterUnreachable("the workers have not told yet which handlers the application has")
        if handler not in self._queues:
            names = ", ".join(sorted(self._queues)[:50])
            raise InvalidTask("handler", f"{handler!r} is not registered; the application has: {names}")
        return self._queues[handler]

    def send(
        self,
        handler: str,
        bodies: Sequence[bytes],
        *,
        queue: str = "default",
        ttr_ms: int = 0,
        keys: Sequence[str] = (),
        traceparent: str = "",
        ids: Ids | None = None,
        due_ms: int = 0,
        then: str = "",
    ) -> Ids:
        """Store tasks (JSON texts) durably, all or none; their ids, in the order of the bodies.

        ``due_ms``: not before this time of the epoch, by the clock of the node that has them then; 0: at once.
        ``keys``: an idempotency key each. ``ids``: send these again, after UnknownSubmit. Raises InvalidTask,
        SubmitFailed, ClusterUnreachable (nothing was stored) or UnknownSubmit (send the same ids again).
        """
        self._after_fork()
        check_options(handler, queue, ttr_ms, None)
        for body in bodies:
            check_body(body)
        if keys and len(keys) != len(bodies):
            raise InvalidTask("keys", f"must be as many as the tasks: {len(keys)} keys, {len(bodies)} tasks")
        for key in keys:
            check_options(handler, queue, ttr_ms, key)
        if not bodies:
            return Ids()
        if ids is None:
            ids = (
                self._ids.take(len(bodies)) if not keys else Ids(keys=tuple(keyed_id(queue, k) for k in keys))
            )
        batches, at = [], 0
        for part in [Ids((run,)) for run in ids.runs] + ([Ids(keys=ids.keys)] if ids.keys else []):
            batches.append(
                TaskBatch(
                    queue=queue,
                    handler=handler,
                    ids=part,
                    bodies=tuple(bodies[at : at + len(part)]),
                    ttr_ms=ttr_ms,
                    due_ms=due_ms,
                    then=then,
                    keys=tuple(keys),
                    traceparent=traceparent,
                    submitted_ms=self.wall_ms(),
                    submitted_by=self._by,
                )
            )
            at += len(part)
        if self._plugin is not None:
            grown = self._append(batches, ids)
            if self._plugin.is_of_one_machine:
                self.wake(grown)
        else:
            self._post(batches, ids)
        return ids

    def _append(self, batches: Sequence[TaskBatch], ids: Ids) -> set[int]:
        """The partitions that grew."""
        with self._lock:
            if self._log is None:
                assert self._plugin is not None
                assert self.cluster.log is not None
                try:
                    self._log = self._plugin.open(self.cluster.log, create=False)
                except LogUnusable as error:
                    if self._plugin.is_of_one_machine:
                        raise  # it is missing, or damaged: trying again will not help
                    raise SubmitFailed(f"nothing was stored: {error}") from error
            try:
                appended = self._log.append(batches)
            except Unsent as error:
                raise SubmitFailed(f"nothing was stored: {error}") from error
            except UnknownAppend as error:
                raise UnknownSubmit(f"the tasks may or may not have been stored: {error}", ids) from error
        return {each.partition for each in appended}

    def wake(self, partitions: Collection[int] = ()) -> None:
        """Tell the nodes of this machine that there is work, in these partitions or in any.

        A lost datagram costs latency, nothing else.
        """
        # Named, they spare every node a look at all the others (node/wake.py). An empty datagram means all.
        named = sorted(partitions)[:WAKE_PARTITIONS_MAX]
        data = struct.pack(f"<{len(named)}H", *named) if len(named) == len(partitions) else b""
        if self._socket is None:
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
        for port in self.cluster.wake_ports:
            try:
                self._socket.sendto(data, ("127.0.0.1", port))
            except OSError:
                continue  # that node is down, or busy enough to look at the log by itself

    def _post(self, batches: Sequence[TaskBatch], ids: Ids) -> None:
        sent = 0
        for lines in _requests(batches):
            try:
                self.request(
                    "POST",
                    "/v1/tasks",
                    content=b"\n".join(lines) + b"\n",
                    content_type="application/x-ndjson",
                )
            except (ClusterUnreachable, Refused) as error:
                if sent or getattr(error, "maybe", False):
                    raise UnknownSubmit(
                        f"{sent} of {len(ids)} tasks were stored, of the rest it is not known: {error}; "
                        "sending the same ids again is safe",
                        ids,
                    ) from error
                if isinstance(error, Refused) and error.status in (400, 413):
                    field = error.field or "task"
                    raise InvalidTask(field, str(error).removeprefix(f"{field}: ")) from error
                raise
            sent += len(lines)

    def _allocate(self, count: int) -> tuple[int, int]:
        answer = self.request("POST", "/v1/ids", json={"count": count}, timeout_s=IDS_TIMEOUT_S)
        return int(answer["start"]), int(answer["count"])

    # --- asking -----------------------------------------------------------------------------------------------

    def handle(self, task_id: TaskId) -> Handle[Any]:
        """The handle of a task that was submitted elsewhere."""
        return Handle(self, task_id)

    def task(self, task_id: TaskId) -> dict[str, Any]:
        """What the cluster knows of a task; ``state`` is always there. UnknownTask if it knows none."""
        return self.request("GET", f"/v1/tasks/{id_text(task_id)}")

    def why(self, task_id: TaskId) -> dict[str, Any]:
        return self.request("GET", f"/v1/tasks/{id_text(task_id)}/why")

    def cancel(self, task_id: TaskId) -> str:
        return str(self.request("POST", f"/v1/tasks/{id_text(task_id)}/cancel").get("state", "cancelled"))

    def wall_ms(self) -> int:
        """The clock by which a delay becomes a time (epoch)."""
        return time.time_ns() // 1_000_000

    def reschedule(
        self, task_id: TaskId, *, delay: Delay | None = None, due: datetime | str | None = None
    ) -> datetime:
        """Let a task that waits for its time wait for another one; that time.

        Refused if it has started, is about to, or does not wait. Asking again is safe.
        """
        check_chosen(delay, due, None)
        due_ms = time_chosen(delay, due, self.wall_ms())
        if not due_ms:
            raise InvalidTask("due", "give delay or due: when the task shall run")
        self._reschedule(task_id, due_ms)
        return datetime.fromtimestamp(due_ms / 1000, UTC)

    def _reschedule(self, task_id: TaskId, due_ms: int) -> None:
        self.request(
            "POST",
            f"/v1/tasks/{id_text(task_id)}/reschedule",
            json={"due": time_text(due_ms)},
            timeout_s=self._timeout_s + _RESCHEDULE_S,
        )

    def retry(self, task_id: TaskId) -> str:
        return str(self.request("POST", f"/v1/tasks/{id_text(task_id)}/retry").get("state", "waiting"))

    def result(self, task_id: TaskId, timeout_s: float | None = None) -> Any:
        """Wait for the task to end; its result as plain JSON values.

        Raises ResultLost if it took effect and no result is recorded: the task was settled by evidence, or the
        node that ran it is gone.
        """
        text = id_text(task_id)
        now = time.monotonic()
        deadline = float("inf") if timeout_s is None else now + timeout_s
        silent_until, state = now + _UNREACHABLE_S, "unknown"
        recorded_until = min(deadline, now + _UNREACHABLE_S)
        while True:
            asked = time.monotonic()
            wait_s = max(0.0, min(_WAIT_S, deadline - asked))
            try:
                answer = self.request(
                    "GET",
                    f"/v1/tasks/{text}/result",
                    params={"wait_ms": int(wait_s * 1000)},
                    timeout_s=wait_s + self._timeout_s,
                )
            except ClusterUnreachable:
                if time.monotonic() >= min(deadline, silent_until):
                    raise
                time.sleep(_PAUSE_S)  # an election, or a node that starts again
                continue
            silent_until = time.monotonic() + _UNREACHABLE_S
            state = str(answer["state"])
            if state == "executed" and (not answer.get("unreachable") or asked >= recorded_until):
                if answer.get("known", True):
                    return answer.get("result")
                note = str(answer.get("note") or "no node remembers it")
                raise ResultLost(f"task {text} took effect; its result is lost: {note}")
            if state == "cancelled":
                raise TaskCancelled(f"task {text} was cancelled before it started")
            if state == "dead":
                raise TaskFailed(f"task {text} is dead: {answer.get('error') or 'no reason was recorded'}")
            if state != "executed" and time.monotonic() >= deadline:
                raise ResultTimeout(f"task {text} is {state} after {timeout_s} seconds")
            if time.monotonic() - asked < wait_s / 2 or state == "executed":
                # The node did not hold its answer back, or the one that remembers the result is starting again.
                time.sleep(_PAUSE_S)

    def request(
        self,
        method: str,
        path: str,
        *,
        json: object = None,
        content: bytes | None = None,
        content_type: str = "application/json",
        params: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """One request to whichever node answers; its JSON answer.

        Each node is tried once, whatever became of the one before: all requests of this API may be repeated.
        Raises Refused (UnknownTask) as a node's answer, or ClusterUnreachable, with ``maybe`` set if a node may
        have done what was asked.
        """
        self._after_fork()
        import httpx  # takes a tenth of a second, and a publisher may never need it

        http = self._connection()
        data = _encode(json) if json is not None else content
        headers = {"content-type": content_type} if data is not None else {}
        failures: list[str] = []
        maybe = False
        for turn in range(len(self.cluster.urls)):
            number = (self._first + turn) % len(self.cluster.urls)
            url = self.cluster.urls[number]
            limit = httpx.Timeout(timeout_s or self._timeout_s, connect=CONNECT_TIMEOUT_S)
            try:
                response = http.request(
                    method, url + path, content=data, params=params, headers=headers, timeout=limit
                )
            except httpx.TransportError as error:
                maybe |= not isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout))
                failures.append(f"{url}: {error or type(error).__name__}")
                continue
            if response.status_code >= 500:
                # 503: the node did not do it. Any other: it cannot tell.
                maybe |= response.status_code != 503
                failures.append(f"{url}: {_error_text(response)[0]}")
                continue
            self._first = number
            if response.status_code >= 400:
                text, field = _error_text(response)
                kind = UnknownTask if response.status_code == 404 else Refused
                raise kind(text, response.status_code, field)
            return _object(response.content, url)
        unreachable = ClusterUnreachable(f"no node of {self.cluster} answers: {'; '.join(failures)}")
        unreachable.maybe = maybe
        raise unreachable

    def _connection(self) -> httpx.Client:
        import httpx

        with self._lock:
            if self._http is None:
                # trust_env=False: a proxy of the environment must not see the token, nor stand before loopback.
                secure = any(url.startswith("https") for url in self.cluster.urls)
                # One that trusts nobody where none is needed: httpx would read the machine's authorities for it.
                nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                self._http = httpx.Client(
                    headers={"authorization": f"Bearer {self.cluster.token}"},
                    trust_env=False,
                    verify=tls_context(self.cluster.ca) if secure else nobody,
                )
            return self._http


def _requests(batches: Sequence[TaskBatch]) -> Iterator[list[bytes]]:
    """The messages of ``batches`` in groups that a node takes in one request, which it stores all or none."""
    lines: list[bytes] = []
    size = 0
    for batch in batches:
        for at in range(len(batch)):
            line = encode_task(batch.part(at, 1))
            if lines and (len(lines) >= _POST_TASKS or size + len(line) > _POST_BYTES):
                yield lines
                lines, size = [], 0
            lines.append(line)
            size += len(line)
    if lines:
        yield lines


def _error_text(response: httpx.Response) -> tuple[str, str | None]:
    try:
        answer = msgspec.json.decode(response.content)
        return str(answer["error"]), answer.get("field")
    except (*UNDECODABLE, KeyError, TypeError, AttributeError):
        return f"HTTP {response.status_code}: {response.text[:200]}", None


def _object(content: bytes, url: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(content, type=dict[str, Any])
    except UNDECODABLE as error:
        raise Refused(f"{url} answered what is no JSON object: {error}") from error
