"""``App`` and ``task``: how a user's functions become handlers, and how tasks are submitted.

A decorated function stays the plain function that it was; beside it stand ``submit`` and its like, with the same
signature. Options are given by ``options(...)``, so that they never mix with the user's arguments.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, cast, overload

import msgspec

from dedup.ids import Ids
from oncekeeper.client import Client
from oncekeeper.dues import Delay, check_chosen, delay_ms, due_ms
from oncekeeper.envelope import check_options
from oncekeeper.errors import ApplicationError, InvalidHandler, InvalidTask, SubmitFailed, UnknownSubmit
from oncekeeper.handle import Handle, Handles
from oncekeeper.handlers import CheckStrategy, Handler
from oncekeeper.schedules import Every

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=bool | Coroutine[Any, Any, bool | None] | None)

SUBMIT_TASKS_MAX = 65_536
"""How many tasks are stored in one transaction at most: the nodes write to the same log, and wait meanwhile."""
_ENCODE_TASKS = 4096


class Options(msgspec.Struct, frozen=True):
    """How a task is submitted; what is None is the handler's own."""

    key: str | None = None
    ttr_ms: int = 0
    queue: str | None = None
    delay_ms: int | None = None
    due_ms: int = 0
    then: str = ""

    def when(self, now_ms: int) -> int:
        """The due time of what is submitted now."""
        if self.due_ms and self.due_ms <= now_ms:
            warnings.warn("due lies in the past: the task runs now", stacklevel=4)
        return self.due_ms if self.delay_ms is None else now_ms + self.delay_ms


class Submitter(Generic[P, R]):
    """A handler as its tasks are submitted."""

    def __init__(self, app: App, handler: Handler, options: Options) -> None:
        self._app = app
        self._options = options
        self.handler = handler

    @property
    def app(self) -> App:
        """The application whose handler this is."""
        return self._app

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> Handle[R]:
        """Store one task durably; its handle. The arguments are those of the function.

        Raises InvalidTask (nothing was stored), SubmitFailed, ClusterUnreachable or UnknownSubmit.
        """
        signature = self.handler.signature
        body = signature.encode(signature.bind(args, kwargs))
        client, options = self._app.client, self._options
        keys = () if options.key is None else (options.key,)
        ids = client.send(
            self.handler.name,
            [body],
            queue=self._queue,
            ttr_ms=options.ttr_ms,
            keys=keys,
            due_ms=options.when(client.wall_ms()),
            then=options.then,
        )
        return Handle(client, next(iter(ids)), signature)

    async def submit_async(self, *args: P.args, **kwargs: P.kwargs) -> Handle[R]:
        """``submit``, in a thread: the event loop goes on while the disk writes."""
        return await asyncio.to_thread(self.submit, *args, **kwargs)

    def submit_many(
        self,
        items: Iterable[Mapping[str, Any] | tuple[Any, ...]],
        *,
        keys: Iterable[str] | None = None,
    ) -> Handles[R]:
        """Store many tasks durably: each item is a mapping of arguments, or a tuple of positional ones.

        ``keys`` gives each its idempotency key. Up to SUBMIT_TASKS_MAX tasks are stored all or none, more in
        several transactions. All items of a sequence are validated before the first is stored; an iterator is
        consumed as it goes. When a later transaction fails, the error's ``submitted`` has the handles of what
        was stored.
        """
        if self._options.key is not None:
            raise InvalidTask(
                "key", "is one key for many tasks: give keys=[...] to submit_many", self.handler.name
            )
        parts: list[Ids] = []
        chunks: Iterable[list[bytes]] = self._chunks(items)
        if isinstance(items, Sequence):
            chunks = list(chunks)
        client, signature = self._app.client, self.handler.signature
        due_ms = self._options.when(client.wall_ms())
        wanted = iter(keys) if keys is not None else None
        try:
            for bodies in chunks:
                some = tuple(islice(wanted, len(bodies))) if wanted is not None else ()
                if wanted is not None and len(some) < len(bodies):
                    raise InvalidTask("keys", "are fewer than the tasks", self.handler.name)
                parts.append(
                    client.send(
                        self.handler.name,
                        bodies,
                        queue=self._queue,
                        ttr_ms=self._options.ttr_ms,
                        keys=some,
                        due_ms=due_ms,
                        then=self._options.then,
                    )
                )
        except (SubmitFailed, UnknownSubmit) as error:
            error.submitted = Handles(client, parts, signature)
            raise
        return Handles(client, parts, signature)

    @property
    def _queue(self) -> str:
        return self._options.queue or self.handler.queue

    def _chunks(self, items: Iterable[object]) -> Iterator[list[bytes]]:
        source, done = iter(items), 0
        while True:
            bodies: list[bytes] = []
            while len(bodies) < SUBMIT_TASKS_MAX and (some := list(islice(source, _ENCODE_TASKS))):
                bodies += self.handler.signature.encode_many(some, done + len(bodies))
            if not bodies:
                return
            done += len(bodies)
            yield bodies


class Task(Submitter[P, R]):
    """A decorated function."""

    def __init__(self, app: App, handler: Handler) -> None:
        super().__init__(app, handler, Options())
        functools.update_wrapper(cast("Callable[..., Any]", self), handler.function)

    @property
    def name(self) -> str:
        """The stable name under which tasks find their handler."""
        return self.handler.name

    def options(
        self,
        *,
        key: str | None = None,
        ttr: float | None = None,
        queue: str | None = None,
        delay: Delay | None = None,
        due: datetime | None = None,
        then: str | None = None,
    ) -> Submitter[P, R]:
        """The same handler with other options.

        ``key``: an idempotency key; of all tasks with it (and this queue) one runs. ``ttr``: time to run, in
        seconds. ``queue``: where the task waits. ``delay``: not before so long after ``submit`` (seconds,
        "30m", a timedelta); or ``due``: not before this time (a datetime with its zone). ``then``: what happens
        when it is due: "run" (the default: at once, on the node that holds it) or "enqueue" (it takes its turn).
        """
        if ttr is not None and not ttr > 0:
            raise InvalidTask("ttr", f"must be above 0 seconds, not {ttr}", self.name)
        ttr_ms = 0 if ttr is None else max(1, round(ttr * 1000))
        try:
            check_options(self.name, queue if queue is not None else self.handler.queue, ttr_ms, key)
            check_chosen(delay, due, then)
            wait_ms = None if delay is None else delay_ms(delay)
            at_ms = 0 if due is None else due_ms(due, time.time_ns() // 1_000_000)
        except InvalidTask as error:
            raise InvalidTask(error.field, error.rule, self.name) from None
        return Submitter(self._app, self.handler, Options(key, ttr_ms, queue, wait_ms, at_ms, then or ""))

    def check(self, function: Callable[P, C]) -> Callable[P, C]:
        """Decorator: ``function``, called with a task's arguments, says whether the task took effect.

        True, False, or None when that cannot be told. It is asked after the task's worker is gone for good.
        """
        if self.handler.check_function is not None or self.handler.strategy is not None:
            raise InvalidHandler(f"{self.name}: there is a check already")
        if self.handler.on_doubt != "check":
            raise InvalidHandler(
                f'{self.name}: a check is never asked with on_doubt="{self.handler.on_doubt}": '
                'declare the task with on_doubt="check"'
            )
        self.handler.check_function = function
        return function

    def delayed(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorator: ``function`` runs in this one's stead for tasks that were delayed, however late they are."""
        if self.handler.delayed_function is not None:
            raise InvalidHandler(f"{self.name}: there is a function for delayed tasks already")
        if inspect.iscoroutinefunction(function) != self.handler.is_async:
            raise InvalidHandler(f"{self.name}: both functions must be async, or none")
        self.handler.delayed_function = function
        return function

    def __repr__(self) -> str:
        return f"<Task {self.name}>"


class SyncTask(Task[P, R]):
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.handler.function(*args, **kwargs)  # type: ignore[no-any-return]


class AsyncTask(Task[P, R]):
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        return self.handler.function(*args, **kwargs)  # type: ignore[no-any-return]


class Decorator(Protocol):
    # A coroutine function is also a function; the first overload that fits wins, and that is what is meant.
    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, function: Callable[P, R], /) -> SyncTask[P, R]: ...


class App:
    """A named set of handlers, and the client by which its tasks are submitted.

    ``cluster`` is a data directory or node addresses; without it ONCEKEEPER_CLUSTER or ./oncekeeper-data, looked
    up at the first submit.
    """

    def __init__(self, name: str, *, cluster: str | os.PathLike[str] | None = None) -> None:
        try:
            check_options(name, "default", 0, None)
        except InvalidTask as error:
            raise InvalidHandler(f"App name: {error.rule}") from None
        self.name = name
        self.handlers: dict[str, Handler] = {}
        self._cluster = cluster
        self._client: Client | None = None
        self._lock = threading.Lock()

    @overload
    def task(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...  # type: ignore[overload-overlap]
    @overload
    def task(self, function: Callable[P, R], /) -> SyncTask[P, R]: ...
    @overload
    def task(
        self,
        *,
        name: str | None = None,
        kind: str = "io",
        length: str = "short",
        ttr: float = 30,
        retries: int = 5,
        retry_delay: float = 1,
        retry_delay_max: float = 300,
        on_doubt: str | CheckStrategy = "hold",
        queue: str = "default",
        schedule: str | Every | None = None,
        tz: str = "",
        catch_up: str = "latest",
    ) -> Decorator: ...
    def task(
        self,
        function: Callable[..., Any] | None = None,
        *,
        name: str | None = None,
        kind: str = "io",
        length: str = "short",
        ttr: float = 30,
        retries: int = 5,
        retry_delay: float = 1,
        retry_delay_max: float = 300,
        on_doubt: str | CheckStrategy = "hold",
        queue: str = "default",
        schedule: str | Every | None = None,
        tz: str = "",
        catch_up: str = "latest",
    ) -> Any:
        """Make a function a handler of this application: ``@app.task`` or ``@app.task(ttr=60, ...)``.

        ``kind``: "io" (threads, or the event loop for async functions) or "cpu" (a process of its own).
        ``length``: "short" or "long", so that long tasks never stand in the way of short ones.
        ``ttr``: seconds to run, after which the worker process is killed. ``retries``: tries after the first one
        raised, the first after ``retry_delay`` seconds, doubling up to ``retry_delay_max``.
        ``on_doubt``: what to do with a task that may or may not have taken effect, because its process died:
        "hold" it for a human (the default: it never runs twice by itself), "rerun" it (for what may happen
        twice), "skip" it (for what may be lost), or "check": ask the function decorated with ``.check``, or a
        strategy such as ``checks.sql(engine)``.
        ``schedule``: a cron line such as "0 9 * * mon-fri" in the time zone ``tz`` (UTC if none is named), or
        ``every("10s")``: the cluster calls the function without arguments, once for each of these times.
        ``catch_up`` says what becomes of those that were missed while no node ran: "none", the "latest", or "all".
        """

        def decorate(function: Callable[..., Any]) -> Task[..., Any]:
            handler = Handler(
                f"{self.name}.{name or getattr(function, '__name__', '')}",
                function,
                kind=kind,
                length=length,
                ttr=ttr,
                retries=retries,
                retry_delay=retry_delay,
                retry_delay_max=retry_delay_max,
                on_doubt=on_doubt,
                queue=queue,
                schedule=schedule,
                tz=tz,
                catch_up=catch_up,
            )
            self._register(handler)
            return (AsyncTask if handler.is_async else SyncTask)(self, handler)

        return decorate if function is None else decorate(function)

    def _register(self, handler: Handler) -> None:
        try:
            check_options(handler.name, handler.queue, 0, None)
        except InvalidTask as error:
            raise InvalidHandler(f"{handler.name}: {error.field}: {error.rule}") from None
        if (standing := self.handlers.get(handler.name)) is not None:
            raise InvalidHandler(
                f"two tasks of one name: {handler.name} is {_place(standing.function)} and "
                f"{_place(handler.function)}; give one of them another with name=..."
            )
        self.handlers[handler.name] = handler

    def verify(self) -> None:
        """Raise ApplicationError, naming every handler that cannot work as it was declared."""
        wrong = []
        for handler in self.handlers.values():
            try:
                handler.verify()
            except InvalidHandler as error:
                wrong.append(str(error))
        if wrong:
            raise ApplicationError("\n".join(wrong))

    @property
    def client(self) -> Client:
        """The client of this application; it is made when it is first asked for."""
        with self._lock:
            if self._client is None:
                self._client = Client(self._cluster)
            return self._client

    def use(self, client: Client | None) -> Client | None:
        """Submit through ``client`` from now on (None: make one anew at the next submit); the one before."""
        with self._lock:
            before, self._client = self._client, client
            return before

    def __repr__(self) -> str:
        return f"<App {self.name}: {len(self.handlers)} handlers>"


def _place(function: Callable[..., Any]) -> str:
    code = getattr(function, "__code__", None)
    place = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', '?')}{place}"


def load_app(target: str, app_dir: str | os.PathLike[str] | None = None) -> App:
    """The verified application that ``target`` ("package.module:name") names; ApplicationError says why not.

    ``app_dir`` goes to the front of ``sys.path``.
    """
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise ApplicationError(f"app={target!r} must be MODULE:NAME, such as shop.tasks:app")
    if app_dir is not None:
        directory = os.path.abspath(app_dir)
        if not os.path.isdir(directory):
            raise ApplicationError(f"app={target!r}: the directory {directory} does not exist")
        if directory not in sys.path:
            sys.path.insert(0, directory)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        # Whatever the user's module raises at import: the node must say so and not start.
        place = f" (from {os.path.abspath(app_dir)})" if app_dir is not None else ""
        raise ApplicationError(
            f"app={target!r}: importing {module_name}{place} failed: {type(error).__name__}: {error}"
        ) from error
    found: object = module
    for name in attribute.split("."):
        found = getattr(found, name, None)
    if not isinstance(found, App):
        apps = [name for name, value in vars(module).items() if isinstance(value, App)]
        hint = f"; it has {', '.join(apps)}" if apps else ""
        raise ApplicationError(
            f"app={target!r}: {module_name} has no App named {attribute!r} (found {type(found).__name__}){hint}"
        )
    if not found.handlers:
        raise ApplicationError(f"app={target!r}: {found.name} has no tasks")
    try:
        found.verify()
    except ApplicationError as error:
        raise ApplicationError(f"app={target!r}: {error}") from None
    return found
