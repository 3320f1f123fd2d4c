"""A whole cluster in one thread, for users' tests of their own handlers.

Ledger, coordinators, ownership, testimony, the sweeper and the work history are the real ones; so are the handlers,
which run in the test's own thread, one at a time. The log is in memory, every node applies the same ledger at once,
and time passes only when the test says so. What happens is therefore the same in every run.

    nodes --propose--> ledger --events--> nodes          clock: run_until_idle() and advance()
    nodes --run------> handlers (this thread)            faults: crash(), kill(), start()
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

from chaos.testing.client import InMemoryClient
from chaos.testing.crashing import Crashes
from chaos.testing.looking import Duration, Known, duration_ms, facts_of, id_of, word
from chaos.testing.loops import beside_the_loop
from chaos.testing.member import Marks, Member
from chaos.testing.postponing import rescheduled
from chaos.testing.scheduling import Scheduling
from dedup.ids import TaskId, id_text, ids_of
from node import messages as m
from node import sweeper
from node.records_model import Attempt, Ending, RecordedEvent, recorded
from node.why import Facts, story
from node.workers.calls import Calls, calls_of
from node.workers.port import HandlerInfo
from oncekeeper.app import App, Submitter
from oncekeeper.client import Client
from oncekeeper.context import CurrentTask
from oncekeeper.envelope import TaskBatch, encode_task
from oncekeeper.errors import OncekeeperError, Refused
from oncekeeper.handle import Handle
from oncekeeper.log.memory import MemoryLog
from oncekeeper.log.port import Aside
from raft.commands import (
    Advance,
    Answer,
    Answered,
    Cancel,
    Command,
    Freed,
    Outcome,
    Proposal,
    PutQueue,
    QueueChanged,
    Resolved,
    Revive,
    Rule,
    SessionClosed,
    SessionOpened,
    Suspected,
    Verdict,
)
from raft.ledger import Ledger

P = ParamSpec("P")
R = TypeVar("R")

PARTITIONS = 12
SESSION_TIMEOUT_MS = 4_000
EPOCH_MS = 1_767_225_600_000  # 2026-01-01T00:00:00Z
IDLE_MS_MAX = 60 * 86_400_000
STEPS_MAX = 1_000_000  # of one call: handlers that submit themselves for ever must not hang a test


class InMemoryCluster:
    """``nodes`` nodes named n1, n2, ..., all up. As a context manager it frees the applications at its end."""

    def __init__(self, nodes: int = 3, partitions: int = PARTITIONS) -> None:
        if nodes < 1:
            raise ValueError(f"nodes={nodes} must be at least 1")
        self.session_timeout_ms = SESSION_TIMEOUT_MS
        self.now_ms = 1_000
        self.ledger = Ledger(1)
        self.log = MemoryLog(partitions, clock_ms=lambda: self.wall_ms)
        self.calls: dict[str, Calls] = {}
        self.infos: dict[str, HandlerInfo] = {}
        self.attempts: list[Attempt] = []
        self.events: list[RecordedEvent] = []
        self.starts: Counter[TaskId] = Counter()
        self.client = InMemoryClient(self)
        self._clients: dict[App, Client | None] = {}  # what the applications had before
        self._async_checks: set[str] = set()
        self._crashes = Crashes()
        self._schedules = Scheduling(self)
        self._members: dict[str, Member] = {}
        self._index = 0
        self._sequence = 0
        self._sweep = False
        self._running = False
        for number in range(1, nodes + 1):
            self.start(f"n{number}")

    # --- applications and tasks -------------------------------------------------------------------------------

    def use(self, app: App) -> None:
        """Have all tasks of ``app`` submitted here, by whomever, until the cluster is closed."""
        if app in self._clients:
            return
        app.verify()
        self._clients[app] = app.use(self.client)
        for name, handler in app.handlers.items():
            self.calls[name] = calls_of(handler)
            self.infos[name] = self.calls[name].info
            if inspect.iscoroutinefunction(handler.check_function):
                self._async_checks.add(name)
        for member in self._live():
            member.know_handlers()
        self._schedules.declare()

    def submit(self, task: Submitter[P, R], *args: P.args, **kwargs: P.kwargs) -> Handle[R]:
        """Submit a task; nothing runs yet. ``task.options(key=...)`` is a task too."""
        self.use(task.app)
        return task.submit(*args, **kwargs)

    def append(self, batches: Iterable[TaskBatch]) -> None:
        grown = frozenset(place.partition for place in self.log.append(list(batches)))
        for member in self._live():
            member.feed(m.MoreToRead(grown))

    def close(self) -> None:
        for app, client in self._clients.items():
            app.use(client)
        self._clients.clear()

    def __enter__(self) -> InMemoryCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- time -------------------------------------------------------------------------------------------------

    @property
    def wall_ms(self) -> int:
        """Milliseconds of the epoch on the virtual clock, which starts with the year 2026."""
        return EPOCH_MS + self.now_ms

    def run(self) -> None:
        """Let everything happen that can happen now."""
        if self._running:
            raise OncekeeperError(
                "a handler waits for another task: in memory one runs after the other, and it would wait for ever"
            )
        self._running = True
        try:
            steps = 0
            self._schedules.turn()
            while sum([member.step() for member in self._live()]) or self._swept():  # each has its turn
                steps += 1
                if steps > STEPS_MAX:
                    raise OncekeeperError(
                        f"there is work left after {STEPS_MAX} steps: do tasks submit each other?"
                    )
            for member in self._live():
                member.commit()
        finally:
            self._running = False

    def run_until_idle(self) -> None:
        """Let everything happen that can, as much time as that takes: retries come due, lost sessions lapse.

        Schedules fire in that time, but what they will fire later is not waited for: that would never end.
        """
        self._run_until(lambda: False, self.now_ms + IDLE_MS_MAX)

    def advance(self, duration: Duration) -> None:
        """Let this much time pass ("10s", "500ms", seconds, or a timedelta), and happen what comes due in it."""
        until_ms = self.now_ms + duration_ms(duration)
        self.run()
        while self.now_ms < until_ms:
            self._pass_time(min(until_ms, self._next_ms() or until_ms, self._fires_ms() or until_ms))
            self.run()

    def run_until_settled(self, task: Known, timeout_s: float | None = None) -> None:
        """Until this task is executed, dead or cancelled, or nothing can happen any more."""
        task_id = id_of(task)
        until_ms = self.now_ms + (IDLE_MS_MAX if timeout_s is None else round(timeout_s * 1000))
        self._run_until(lambda: self.state(task_id) in ("executed", "dead", "cancelled"), until_ms)

    def _run_until(self, done: Callable[[], bool], until_ms: int) -> None:
        self.run()
        while not done() and self.now_ms < until_ms:
            next_ms = self._next_ms()
            if next_ms is None:
                return
            self._pass_time(min(next_ms, until_ms, self._fires_ms() or until_ms))
            self.run()

    def _next_ms(self) -> int | None:
        """When something may happen next; None: nothing waits by time."""
        times = [at_ms for member in self._live() for at_ms in member.looks]
        alive = {member.session for member in self._live()}
        if alive:
            # Dead nodes' sessions lapse, and somebody must be there to take over.
            lost = [s for s in self.ledger.sessions.values() if s.session not in alive]
            times += [self.now_ms + max(1, session.expires_ms - self.ledger.now_ms) for session in lost]
        return max(self.now_ms + 1, min(times)) if times else None

    def _fires_ms(self) -> int | None:
        at_ms = self._schedules.next_ms
        return None if at_ms is None else max(self.now_ms + 1, at_ms)

    def _pass_time(self, until_ms: int) -> None:
        step_max_ms = self.ledger.settings.advance_ms_max
        while self.now_ms < until_ms:
            step_ms = min(step_max_ms, until_ms - self.now_ms)
            self.now_ms += step_ms
            self.propose((Advance("test", step_ms),))
            for member in self._live():
                member.beat()
        for member in self._live():
            member.tick()

    # --- faults -----------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> dict[str, bool]:
        """Which nodes are alive."""
        return {name: member.alive for name, member in self._members.items()}

    def kill(self, node: str) -> None:
        """Kill a node as ``kill -9`` does. What it held is in doubt once its session has lapsed, 4 s later."""
        member = self._member(node)
        member.alive = False

    def start(self, node: str) -> None:
        """Start a node (again). It has the work journals of its former lives, and testifies from them."""
        former = self._members.get(node)
        if former is not None and former.alive:
            raise ValueError(f"{node} is alive: kill it first")
        marks: Marks = former.marks if former is not None else {}
        member = Member(self, node, former.incarnation + 1 if former is not None else 1, marks)
        self._members[node] = member
        member.join()

    def crash(
        self, task: Submitter[Any, Any], at: str | int = "end", *, node: bool = False, times: int = 1
    ) -> None:
        """The next run of this handler, of whichever task, is the last of its worker process.

        ``at``: "start" (before its first line), "end" (after it has returned, before anybody is told), or a line:
        its number in the file, or a piece of its text; then the crash is right before that line. ``node``: the
        node dies with it. ``times``: so many runs. Being in the test's own process, a crash at a line lets
        ``finally`` and ``with`` do their work; the fixture oncekeeper_crash_points kills real processes.
        """
        self.use(task.app)
        self._crashes.plan(task.handler, at, node=node, times=times)

    def call(self, task: CurrentTask, calls: Calls, arguments: Any) -> object:
        """Run a handler, with the crash that is planned for it."""
        return self._crashes.run(task, calls, arguments)

    def check(self, task: CurrentTask, calls: Calls, arguments: Any) -> bool | None:
        """Ask a handler's check."""
        if calls.info.name in self._async_checks:
            return beside_the_loop(lambda: calls.check(task, arguments))
        return calls.check(task, arguments)

    # --- looking ----------------------------------------------------------------------------------------------

    def status(self, task: Known) -> str:
        """waiting, delayed, running, suspect, executed, dead or cancelled."""
        return self.describe(task).state

    def result(self, task: Handle[R], timeout: float | None = None) -> R:
        """Run until the task has ended, and give what the handler returned; errors as of ``Handle.result``.

        ``timeout`` is in seconds of the virtual clock.
        """
        return task.result(timeout)

    def runs(self, task: Known) -> int:
        """How many times its handler was started."""
        return self.starts[id_of(task)]

    def why(self, task: Known) -> list[str]:
        """The task's story, in the sentences of ``oncekeeper why``."""
        return story(self.describe(task))

    def dead_letters(self) -> dict[str, str]:
        """The dead tasks by id, each with its reason."""
        return self._aside("dead", ("dead",))

    def suspects(self) -> dict[str, str]:
        """The tasks that are held for a human, by id, each with the reason."""
        return self._aside("suspect", ("suspect",))

    def _aside(self, kind: str, states: tuple[str, ...]) -> dict[str, str]:
        rows = self.log.aside(kind, 0, 1_000_000)
        return {id_text(task.id): task.reason for _, task in rows if self.state(task.id) in states}

    def state(self, task_id: TaskId) -> str:
        return word(self.ledger.describe(task_id), self.ledger.now_ms)

    def describe(self, task: Known) -> Facts:
        """All that is known of a task. Raises UnknownTask."""
        return facts_of(self, id_of(task))

    def finished(self, task_id: TaskId) -> Attempt | None:
        """The attempt that did it; None: evidence settled the task, and nobody reported."""
        attempts = [part for each in self.attempts if (part := each.of(task_id)) is not None]
        done = [each for each in attempts if each.ending is Ending.DONE]
        done = done or [each for each in attempts if each.ending is Ending.LAPSED and not each.error]
        return done[-1] if done else None

    def fired(self, task: Submitter[Any, Any]) -> list[str]:
        """The ids of the tasks that a handler's schedule has submitted so far, in their order."""
        return [id_text(task_id) for task_id in self._schedules.fired.get(task.handler.name, ())]

    # --- steering ---------------------------------------------------------------------------------------------

    def pause(self, queue: str = "default") -> None:
        """Take no more tasks of a queue."""
        self.propose((PutQueue(queue, True, "test"),))

    def resume(self, queue: str = "default") -> None:
        self.propose((PutQueue(queue, False, "test"),))

    def cancel(self, task: Known) -> None:
        """Delete a task before it starts; Refused if it is too late."""
        self._decide(Cancel(ids_of([id_of(task)]), "human:test"), task, "too late to cancel")

    def reschedule(self, task: Known, due_ms: int) -> None:
        """Let a delayed task be due at another time (epoch); Refused if it has started, or waits for none.

        Handles have ``reschedule(delay=...)``.
        """
        self.describe(task)  # UnknownTask
        if not rescheduled(self, id_of(task), due_ms):
            raise Refused(f"cannot reschedule: it is {self.status(task)}", 409)

    def tell(self, node: str, partitions: frozenset[int]) -> None:
        """Delayed tasks of these were moved: a node forgets what it knows of them."""
        member = self._members[node]
        member.feed(m.DelaysChanged(partitions))
        member.hear_all()

    def retry(self, task: Known) -> None:
        """Let a dead or cancelled task run again; Refused if it is neither."""
        task_id = id_of(task)
        if self.state(task_id) == "cancelled" and (places := self.log.find(task_id)):
            message = encode_task(places[-1].batch)
            self.log.put_aside([Aside("dead", task_id, message, "brought back by hand", self.wall_ms)])
        self._decide(Revive(ids_of([task_id]), "human:test"), task, "nothing to retry")

    def rule(self, task: Known, *, executed: bool, reason: str = "") -> None:
        """Decide about a suspect, as a human does by ``oncekeeper suspect rule``."""
        verdict = Verdict.EXECUTED if executed else Verdict.NOT_EXECUTED
        self._decide(Rule(ids_of([id_of(task)]), verdict, "human:test", reason), task, "no suspect")

    def _decide(self, command: Command, task: Known, why_not: str) -> None:
        (answer,) = self.propose((command,))
        if not isinstance(answer, Answered) or answer.spans[0].outcome is not Outcome.SETTLED:
            raise Refused(f"{why_not}: it is {self.status(task)}", 409)

    # --- the ledger -------------------------------------------------------------------------------------------

    def propose(self, commands: tuple[Command, ...]) -> tuple[Answer, ...]:
        """Apply at once, and tell all nodes what it changed."""
        self._index += 1
        self._sequence += 1
        effects = self.ledger.apply_proposal(self._index, Proposal(1, self._sequence, commands))
        self.events.extend(recorded(effects, self.wall_ms))
        for event in effects.events:
            self._noticed(event)
        return effects.answers

    def _noticed(self, event: object) -> None:
        match event:
            case SessionOpened() | SessionClosed():
                for member in self._live():
                    member.assign()
            case Freed() | Resolved():
                self._sweep = True
                self._tick()
            case Suspected() | QueueChanged():
                self._tick()
            case _:
                pass

    def _tick(self) -> None:
        for member in self._live():
            member.tick()

    def _swept(self) -> bool:
        """Bring back what lies aside and may run again; whether there was anything."""
        if not self._sweep:
            return False
        self._sweep = False
        found = False
        for kind in ("dead", "suspect"):
            tasks = [task for _, task in self.log.aside(kind, 0, 1_000_000)]
            again, drop = sweeper.Verdicts(self.ledger).split(tasks)
            if again:
                sweeper.append_again(self.log, again, self._woken)
                found = True
            self.log.drop_aside(drop)
        return found

    def _woken(self, partitions: set[int]) -> None:
        for member in self._live():
            member.feed(m.MoreToRead(frozenset(partitions)))

    def _live(self) -> list[Member]:
        return [member for member in self._members.values() if member.alive]

    def _member(self, node: str) -> Member:
        if node not in self._members:
            raise ValueError(f"there is no node {node!r}: {', '.join(self._members)}")
        return self._members[node]

    def __repr__(self) -> str:
        counts = self.ledger.counts()
        return f"<InMemoryCluster {self.nodes}, {counts}>"
