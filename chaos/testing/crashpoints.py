"""Killing a handler at each of its steps, to find out whether its check tells the truth.

The check is what exactly-once rests on: when a worker dies, the cluster asks it whether the task took effect. So it
is asked here after a death at every place of a run (chaos/testing/places.py), and its answer is held against the
user's own measure of the effect. Where it says False, the task is run again, as the cluster would, and the effect
must then stand once.

A lie is True without an effect (the task would be lost) or False with one (it would run twice). None is no lie:
the cluster asks again, and then a human.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Callable, Collection, Mapping
from types import ModuleType
from typing import Any

from chaos.testing.children import Ended, HungChild, Notes, die, run_in_child, watch_engines
from chaos.testing.loops import beside_the_loop
from chaos.testing.oracle import Oracle, OracleError, oracle_of
from chaos.testing.places import END, START, Place, Walk, some_of
from chaos.testing.report import ONCE, CrashReport, Finding, lie_about
from node.workers.calls import one_line
from oncekeeper.app import Submitter
from oncekeeper.arguments import Arguments
from oncekeeper.context import CurrentTask
from oncekeeper.errors import AlreadyExecuted, InvalidHandler
from oncekeeper.handlers import Handler

PLACES_MAX = 200
TIMEOUT_S = 30.0
WALK_MAX = 20_000  # places of one run that are told apart; what comes after is not walked
NEVER = Place("never")


class CrashPointsError(Exception):
    """The walk could not be made: the handler fails without a crash, or the effect cannot be measured."""


class Abort(BaseException):
    """Stands for the death of the process, where the handler runs in the test's own."""


class CrashPoints:
    """Callable; see ``__call__``. ``timeout_s``: how long one run of the handler, or of its check, may take."""

    def __init__(self, timeout_s: float = TIMEOUT_S, places_max: int = PLACES_MAX) -> None:
        self.timeout_s = timeout_s
        self.places_max = places_max

    def __call__(
        self,
        task: Submitter[Any, Any],
        arguments: Mapping[str, Any] | Callable[[int], Mapping[str, Any]],
        *,
        effects: Callable[..., int] | None = None,
        observe: Callable[[], Any] | None = None,
        setup: Callable[[], object] | None = None,
        into: Collection[ModuleType | str] = (),
        in_process: bool = False,
        fail: bool = True,
    ) -> CrashReport:
        """Kill ``task`` at each place of a run, and ask its check each time.

        ``arguments``: of the handler, by name; or a function of the run's number that gives them. ``setup`` is
        called before each run, and must bring the world back to where the task has not taken effect; without
        it, each run needs other arguments. The measure of the effect, one of:

        - ``effects``: how many times the effect stands (a bool will do). Called with the task's arguments, if it
          takes any.
        - ``observe``: anything that can be compared, such as the rows of a table. What it answers after ``setup``
          is no effect, what it answers after a whole run is the effect, and all else is a part of it.

        ``into``: further modules, or files, whose lines are places too. ``in_process``: run in the test's own
        process, for effects on what lives in its memory; a crash is then an exception that no ``except
        Exception`` stops, so that ``finally`` and ``with`` still do their work, which real crashes do not grant.

        Raises AssertionError with the report if the check lied and ``fail`` is true; CrashPointsError if the walk
        could not be made.
        """
        __tracebackhide__ = True  # the report is what is to be read
        oracle, files = oracle_of(effects, observe), _files(task.handler, into)
        walk = _Walked(self, task.handler, arguments, oracle, setup, files, in_process)
        report = walk.report()
        if fail and report.lies:
            raise AssertionError(str(report))
        return report


class _Walked:
    """One walk through one handler."""

    def __init__(
        self,
        settings: CrashPoints,
        handler: Handler,
        arguments: Mapping[str, Any] | Callable[[int], Mapping[str, Any]],
        oracle: Oracle,
        setup: Callable[[], object] | None,
        files: Collection[str],
        in_process: bool,
    ) -> None:
        if handler.on_doubt not in ("check", "rerun"):
            raise InvalidHandler(
                f'{handler.name}: on_doubt="{handler.on_doubt}" asks nobody after a crash, so there is nothing to '
                "verify: give it a check"
            )
        handler.verify()
        self._settings = settings
        self._handler = handler
        self._given = arguments
        self._oracle = oracle
        self._setup = setup
        self._files = files
        self._in_process = in_process
        self._runs = 0

    def report(self) -> CrashReport:
        watch_engines()
        places = [START, *self._whole_run(), END]
        findings = [self._crash(NEVER, None)]
        for number in some_of(places, self._settings.places_max):
            findings.append(self._crash(places[number], number))
        return CrashReport(
            handler=self._handler.name,
            check=_check_name(self._handler),
            findings=tuple(findings),
            walked=len(places),
        )

    # --- one crash --------------------------------------------------------------------------------------------

    def _whole_run(self) -> list[Place]:
        """The places of a run that nobody disturbs; it also shows the measure what the effect looks like."""
        values, task = self._fresh()
        places: list[Place] = []

        def work(note: Callable[[object], None]) -> None:
            def pass_by(place: Place) -> None:
                if len(places) < WALK_MAX:
                    places.append(place)

            self._run(task, values, Walk(self._files, pass_by))
            note([(each.kind, each.file, each.line, each.call) for each in places])

        ended = self._process(work, "a whole run")
        if not ended.notes:
            raise CrashPointsError(
                f"{self._handler.name} does not end well without any crash:\n{ended.error}"
            )
        try:
            self._oracle.learn(values)
        except OracleError as error:
            raise CrashPointsError(f"{self._handler.name}: after a whole run {error}") from None
        return [Place(*each) for each in ended.notes[-1]]

    def _crash(self, place: Place, number: int | None) -> Finding:
        """Run up to the place of this number, and die there; ask the check; do as it says."""
        values, task = self._fresh()
        if number is not None:
            self._run_until(place, number, values, task)
        effect = self._oracle.effect(values)
        answer: bool | None = False
        error = ""
        if self._handler.on_doubt == "check":
            answer, error = self._ask(values, task)
        # A policy of rerun claims nothing about the effect, only that another run does no harm: that run tells.
        lie = lie_about(effect, answer) if self._handler.on_doubt == "check" else ""
        if answer is False and not lie:
            lie = self._again(values, task)
        return Finding(place=place, effect=effect, answer=answer, error=error, lie=lie)

    def _run_until(self, place: Place, number: int, values: Mapping[str, Any], task: CurrentTask) -> None:
        passed = 0
        end = place.kind == "end"

        def arrive(_: Place) -> None:
            nonlocal passed
            passed += 1
            if not end and passed == number:
                self._die()

        def work(note: Callable[[object], None]) -> None:
            if number > 0:
                self._run(task, values, Walk(self._files, arrive))
            self._die()

        self._process(work, f"a run that is killed at {place.file}:{place.line}")

    def _again(self, values: Mapping[str, Any], task: CurrentTask) -> str:
        """The next attempt, as the cluster would make it: what is wrong with what stands after it."""
        task = CurrentTask(task.id, task.handler, task.fence + 1, task.attempt + 1, task.queue)

        def work(note: Callable[[object], None]) -> None:
            self._run(task, values, None)
            note("done")

        ended = self._process(work, "a second run")
        if not ended.notes:
            last = ended.error.strip().splitlines()[-1] if ended.error.strip() else "its process died"
            return f"run again, it failed: {last}"
        after = self._oracle.effect(values)
        return "" if after == ONCE else f"run again, as it asked for, the effect stands: {after}"

    def _ask(self, values: Mapping[str, Any], task: CurrentTask) -> tuple[bool | None, str]:
        """The check's answer, from another process than the one that died; and what it raised."""

        def work(note: Callable[[object], None]) -> None:
            try:
                note(["answer", beside_the_loop(lambda: self._handler.check(task, self._arguments(values)))])
            except Exception as error:  # noqa: BLE001 - a check that raises cannot tell, in a worker as here
                note(["error", one_line(error)])

        ended = self._process(work, "the check")
        if not ended.notes:
            return None, ended.error.strip().splitlines()[-1] if ended.error.strip() else "its process died"
        kind, said = ended.notes[-1]
        return (said, "") if kind == "answer" else (None, said)

    # --- processes --------------------------------------------------------------------------------------------

    def _fresh(self) -> tuple[Mapping[str, Any], CurrentTask]:
        """A world without the effect, and a task that nothing knows of yet."""
        if self._setup is not None:
            self._setup()
        given = self._given
        values = given(self._runs) if callable(given) else given
        self._runs += 1
        try:
            self._oracle.expect_none(values, fresh_arguments=callable(given))
        except OracleError as error:
            raise CrashPointsError(f"{self._handler.name}: before run {self._runs} {error}") from None
        # A random id: marks of an earlier test in the same database must not be this task's.
        task = CurrentTask(os.urandom(16), self._handler.name, self._runs * 2, 1, self._handler.queue)
        return values, task

    def _process(self, work: Callable[[Callable[[object], None]], None], what: str) -> Ended:
        if self._in_process:
            told: list[object] = []
            try:
                work(told.append)
            except Abort:
                return Ended(told, killed=True)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - told as a child tells it
                return Ended(told, f"{type(error).__name__}: {error}")
            return Ended(told)

        def in_child(notes: Notes) -> None:
            work(notes.add)

        try:
            return run_in_child(in_child, self._settings.timeout_s)
        except HungChild as error:
            raise CrashPointsError(f"{self._handler.name}: {what}: {error}") from None

    def _die(self) -> None:
        if self._in_process:
            raise Abort
        die()

    def _arguments(self, values: Mapping[str, Any]) -> Arguments:
        # Through JSON and back: the handler gets what a worker would give it.
        return self._handler.decode(self._handler.signature.encode(values))

    def _run(self, task: CurrentTask, values: Mapping[str, Any], walk: Walk | None) -> None:
        """As a worker runs it."""
        arguments = self._arguments(values)

        def call() -> object:
            returned = self._handler.run(arguments)
            return asyncio.run(returned) if inspect.iscoroutine(returned) else returned

        def recorded() -> None:
            try:
                with self._handler.running(task):
                    walk.run(call) if walk is not None else call()
            except AlreadyExecuted:
                return  # as in a worker: it is done, by evidence

        if self._handler.is_async:
            beside_the_loop(recorded)
        else:
            recorded()


def _files(handler: Handler, into: Collection[ModuleType | str]) -> set[str]:
    function = inspect.unwrap(handler.function)
    files = {function.__code__.co_filename}
    for each in into:
        file = each if isinstance(each, str) else each.__file__
        if file is None:
            raise CrashPointsError(f"into: {each!r} has no file whose lines could be walked")
        files.add(file)
    return files


def _check_name(handler: Handler) -> str:
    if handler.on_doubt == "rerun":
        return 'Its policy on_doubt="rerun"'
    if handler.strategy is not None:
        return f"Its check ({type(handler.strategy).__name__})"
    return f"Its check {getattr(handler.check_function, '__name__', '')}"
