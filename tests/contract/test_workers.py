"""Real worker processes under handlers that behave and misbehave: each fault costs at most one worker."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
import uvloop

from dedup.ids import Ids
from node.workers.events import (
    PoolSettings,
    Printed,
    WorkerEnded,
    WorkerFailed,
    WorkerStartError,
)
from node.workers.journal import DATA_AT
from node.workers.pools import WorkerPools
from node.workers.port import Ended, Mode, Part, Work
from tests.support.worker_pool import ROOT, Bench, bench, body, is_running, lines, until

DONE, RAISED, INVALID = Ended.DONE, Ended.RAISED, Ended.INVALID
CRASHED, TIMED_OUT, NOT_STARTED = Ended.CRASHED, Ended.TIMED_OUT, Ended.NOT_STARTED


def test_results_come_back_at_their_positions(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path) as it:
            number = it.submit("bad.double", [body(n=n) for n in range(3)])
            await it.ends(number, 3)
            report = next(report for report in it.reports if report.number == number)
            assert report.parts == (Part(0, 3, DONE, (b"0", b"2", b"4")),)
            assert report.pid in it.pids()

    asyncio.run(act())


def test_neighbours_without_results_are_one_part(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path) as it:
            assert await it.states("bad.nothing", *[b"{}"] * 5000) == [DONE] * 5000
            assert all(part.results is None for report in it.reports for part in report.parts)
            assert len(it.reports) < 100

    asyncio.run(act())


def test_a_handler_that_raises_fails_alone_with_one_line_and_a_trace(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path) as it:
            ends = await it.run("bad.odd_raises", *(body(n=n) for n in range(4)))
            assert [end.ended for end in ends] == [DONE, RAISED, DONE, RAISED]
            assert ends[1].error == "ValueError: 1 is odd"
            assert "in odd_raises" in ends[1].trace
            assert "node/workers" not in ends[1].trace
            assert not [event for event in it.events if isinstance(event, WorkerEnded)]

    asyncio.run(act())


@pytest.mark.parametrize("how", ["SystemExit", "KeyboardInterrupt"])
def test_a_handler_cannot_end_its_worker_by_an_exception(tmp_path: Path, how: str) -> None:
    async def act() -> None:
        async with bench(tmp_path) as it:
            pids = it.pids()
            (end,) = await it.run("bad.leave", body(how=how))
            assert (end.ended, end.error.partition(":")[0]) == (RAISED, how)
            assert await it.states("bad.nothing", b"{}") == [DONE]
            assert set(pids) <= set(it.pids())

    asyncio.run(act())


def test_already_executed_is_done(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path) as it:
            assert await it.run("bad.leave", body(how="done")) == [Part(0, 1, DONE)]

    asyncio.run(act())


def test_a_second_transaction_is_not_tried_again(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path) as it:
            for handler in ("bad.leave", "bad.leave_io"):
                (end,) = await it.run(handler, body(how="second"))
                assert (end.ended, end.error) == (INVALID, "SecondTransaction: one mark cannot tell of two")
                assert f"in {handler.removeprefix('bad.')}" in end.trace

    asyncio.run(act())


def test_nobody_says_when_the_task_of_a_dead_worker_started(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path) as it:
            await it.run("bad.leave", body(how="kill"))
            assert (it.reports[-1].started_ms, it.reports[-1].busy_us) == (0, 0)

    asyncio.run(act())


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("_exit", "exited with status 5"),
        ("segfault", "died of SIGSEGV"),
        ("kill", "died of SIGKILL"),
        ("close", "status 0"),
        ("scribble", "a frame of 4294967295 bytes exceeds"),
        ("lie", "work 999 is not its own"),
    ],
)
def test_a_worker_that_dies_leaves_one_task_in_doubt_and_is_replaced(
    tmp_path: Path, how: str, why: str
) -> None:
    async def act() -> None:
        async with bench(tmp_path) as it:
            await it.run("bad.nothing", b"{}")
            ends = await it.run("bad.leave", body(how=""), body(how=how), body(how=""), body(how=""))
            if how == "close":
                # It goes on until it must speak, and what it did meanwhile stands in the journal. The first may
                # have been told in time: what is finished is told every few milliseconds.
                assert [end.ended for end in ends] == [DONE] * 4
                assert all("the result was lost" in end.error for end in ends[1:])
            else:
                assert [end.ended for end in ends] == [DONE, CRASHED, NOT_STARTED, NOT_STARTED]
                assert why in ends[1].error
                assert ends[0].error == "" or "the result was lost with its worker" in ends[0].error
            assert await it.states("bad.nothing", b"{}") == [DONE]
            ended = [event for event in it.events if isinstance(event, WorkerEnded)]
            assert [event.in_doubt for event in ended] == [0 if how == "close" else 1]

    asyncio.run(act())


def test_what_was_running_when_the_worker_was_killed_is_in_doubt_and_the_rest_is_known(
    tmp_path: Path,
) -> None:
    async def act() -> None:
        async with bench(tmp_path / "work") as it:
            effects = tmp_path / "effects"
            bodies = [body(path=str(effects), n=n, die_at=6) for n in range(10)]
            ends = [end.ended for end in await it.run("bad.effect", *bodies)]
            assert ends == [DONE] * 6 + [CRASHED] + [NOT_STARTED] * 3
            assert lines(effects) == [str(n) for n in range(7)]

    asyncio.run(act())


def test_an_interpreter_that_is_held_for_ever_is_killed_at_its_time_to_run(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path / "work") as it:
            effects = tmp_path / "effects"
            one = body(path=str(effects))
            ends = await it.run("bad.hold_interpreter", one, one)
            assert [end.ended for end in ends] == [TIMED_OUT, NOT_STARTED]
            assert ends[0].error == "killed at its time-to-run of 300 ms"
            assert len(lines(effects)) == 1
            await until(lambda: not is_running(int(lines(effects)[0])), "the worker is gone")

    asyncio.run(act())


def test_what_a_handler_spawned_dies_with_its_worker(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path / "work") as it:
            pid_file = tmp_path / "child"
            assert await it.states("bad.spawn_child", body(path=str(pid_file))) == [TIMED_OUT]
            await until(lambda: not is_running(int(lines(pid_file)[0])), "the child is gone")

    asyncio.run(act())


def test_a_time_to_run_is_one_tasks_and_not_the_batchs(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path / "work") as it:
            bodies = tuple(body(path=str(tmp_path / "e"), n=n, pause_s=0.1) for n in range(8))
            it.pools.submit(Work(9, Mode.RUN, "bad.effect", Ids(((1, 8),)), 1, 1, 400, bodies))
            assert [end.ended for end in await it.ends(9, 8)] == [DONE] * 8

    asyncio.run(act())


def test_a_thread_that_hangs_costs_its_process(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path) as it:
            assert await it.states("bad.hang", b"{}") == [TIMED_OUT]
            assert await it.states("bad.async_which", b"{}") == [DONE]

    asyncio.run(act())


def test_the_neighbours_of_a_thread_that_hangs_finish_first_and_what_waits_comes_back(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path / "work", io_threads=2) as it:
            one = body(path=str(tmp_path / "e"), pause_s=1.0)
            hung = it.submit("bad.hang", [b"{}"])
            nap = it.submit("bad.nap", [one, one])
            assert [end.ended for end in await it.ends(nap, 2)] == [DONE, NOT_STARTED]
            assert [end.ended for end in await it.ends(hung, 1)] == [TIMED_OUT]
            assert await it.states("bad.async_which", b"{}") == [DONE]
            assert len(lines(tmp_path / "e")) == 1

    asyncio.run(act())


def test_what_ends_late_but_before_it_was_killed_is_told_as_it_ended(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path / "work") as it:
            late = (body(path=str(tmp_path / "e"), pause_s=0.8),)
            neighbour = it.submit("bad.nap", [body(path=str(tmp_path / "e"), pause_s=1.2)])
            it.pools.submit(Work(9, Mode.RUN, "bad.nap", Ids(((1, 1),)), 1, 1, 300, late))
            assert [end.ended for end in await it.ends(9, 1)] == [DONE]
            assert [end.ended for end in await it.ends(neighbour, 1)] == [DONE]
            assert await it.states("bad.async_which", b"{}") == [DONE]
            assert [event.in_doubt for event in it.events if isinstance(event, WorkerEnded)] == [0]

    asyncio.run(act())


def test_handlers_run_in_the_applications_directory(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path / "work") as it:
            (end,) = await it.run("bad.nap", body(path=str(tmp_path / "e"), pause_s=0))
            assert end.results == (f'"{ROOT}"'.encode(),)

    asyncio.run(act())


def test_a_coroutine_that_hangs_costs_its_process_and_not_its_neighbours(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path / "work") as it:
            hung = it.submit("bad.hang_async", [body(path=str(tmp_path / "late"), wait_s=0.6)])
            nap = it.submit("bad.nap_async", [body(pause_s=1.0)] * 3)
            assert [end.ended for end in await it.ends(nap, 3)] == [DONE] * 3
            (end,) = await it.ends(hung, 1)
            assert end.ended in (TIMED_OUT, DONE)
            # What it had left to a thread either took effect before the report, or never will.
            assert (end.ended is DONE) == bool(lines(tmp_path / "late"))

    asyncio.run(act())


def test_a_coroutine_that_never_ends_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path / "work") as it:
            (end,) = await it.run("bad.hang_async", body(path=str(tmp_path / "late"), wait_s=600))
            assert (end.ended, end.error) == (TIMED_OUT, "killed at its time-to-run of 300 ms")
            assert not lines(tmp_path / "late")
            assert [event.in_doubt for event in it.events if isinstance(event, WorkerEnded)] == [1]

    asyncio.run(act())


def test_results_of_io_tasks_come_in_several_frames_too(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path) as it:
            ends = await it.run("bad.giant_async", *[body(size=250_000)] * 200)
            assert all(end.results is not None and len(end.results[0]) == 250_002 for end in ends)

    asyncio.run(act())


def test_a_worker_that_eats_memory_is_killed_by_its_size(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path, memory_bytes_max=200 << 20) as it:
            (end,) = await it.run("bad.hog", body(mebibytes=800))
            assert end.ended is CRASHED
            assert "memory_bytes_max=209715200" in end.error

    asyncio.run(act())


def test_an_allocation_far_beyond_the_bound_fails_at_once(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path, memory_bytes_max=200 << 20) as it:
            (end,) = await it.run("bad.hog", body(mebibytes=4000, at_once=True))
            assert (end.ended, end.error) == (RAISED, "MemoryError")

    asyncio.run(act())


def test_what_handlers_print_becomes_lines_with_the_task_and_never_frames(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path) as it:
            assert [end.ended for end in await it.run("bad.chatter", body(lines=2000), start=42)] == [DONE]
            await until(lambda: any("dropped" in line for _, line in printed(it)), "the flood is cut")
            found = printed(it)
            assert ("42", "to standard output") in found
            assert ("42", "to standard error") in found
            assert ("", "raw \x00\\xff bytes") in found
            assert ("42", "flood 0") in found
            assert len(found) < 1100

    asyncio.run(act())


def printed(it: Bench) -> list[tuple[str, str]]:
    return [(event.task, event.line) for event in it.events if isinstance(event, Printed)]


def test_a_result_that_is_too_large_or_no_json_is_dropped_and_the_task_is_done(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path) as it:
            fits, large = await it.run("bad.giant", body(size=200_000), body(size=300_000))
            assert fits.results is not None
            assert len(fits.results[0]) == 200_002
            assert (large.ended, large.results) == (DONE, None)
            assert "300002 bytes" in large.error
            (none,) = await it.run("bad.no_json", b"{}")
            assert (none.ended, none.results) == (DONE, None)
            assert none.error.startswith("the result was dropped")

    asyncio.run(act())


def test_many_large_results_come_in_several_frames(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path) as it:
            ends = await it.run("bad.giant", *[body(size=200_000)] * 200)
            assert all(end.results is not None and len(end.results[0]) == 200_002 for end in ends)

    asyncio.run(act())


def test_an_unknown_handler_and_bodies_that_do_not_fit_are_invalid_one_by_one(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path) as it:
            assert await it.states("bad.unheard_of", b"{}", b"{}") == [INVALID] * 2
            bodies = (b'{"n":1}', b'{"n":"one"}', b'{"m":1}', b"not json", b'{"n":2}')
            ends = await it.run("bad.double", *bodies)
            assert [end.ended for end in ends] == [DONE, INVALID, INVALID, INVALID, DONE]
            assert all(end.error for end in ends[1:4])

    asyncio.run(act())


def test_validate_names_the_first_body_that_does_not_fit(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path) as it:
            assert await it.pools.validate("bad.double", [b'{"n":1}']) is None
            wrong = await it.pools.validate("bad.double", [b'{"n":1}', b'{"n":"one"}', b"{}"])
            assert wrong is not None
            assert wrong[0] == 1
            assert wrong[1] == "bad.double: n: expected int, got str"
            unknown = await it.pools.validate("bad.unheard_of", [b"{}"])
            assert unknown is not None
            assert "unheard_of" in unknown[1]

    asyncio.run(act())


def test_validating_needs_no_lease(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path) as it:
            it.pools.set_lease(0)
            assert await it.pools.validate("bad.double", [b'{"n":1}']) is None

    asyncio.run(act())


def test_without_cpu_workers_cpu_handlers_run_on_threads(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path, cpu_workers=0) as it:
            assert [end.results for end in await it.run("bad.double", body(n=4))] == [(b"8",)]

    asyncio.run(act())


def test_the_pools_run_on_uvloop(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path) as it:
            assert await it.states("bad.double", body(n=1)) == [DONE]
            assert await it.states("bad.async_which", b"{}") == [DONE]
            assert await it.states("bad.leave", body(how="kill")) == [CRASHED]
            assert await it.states("bad.chatter", body(lines=1)) == [DONE]
            await until(lambda: printed(it), "it printed")

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(act())


def test_what_is_submitted_to_stopped_pools_comes_back_not_started(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path) as it:
            await it.pools.stop()
            assert await it.states("bad.double", body(n=1)) == [NOT_STARTED]

    asyncio.run(act())


def test_checks_answer_true_false_or_unsure(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path) as it:
            answers = [body(answer=text) for text in ("yes", "no", "", "raise")]
            ends = await it.run("bad.checked", *answers, mode=Mode.CHECK)
            assert [end.ended for end in ends] == [Ended.TRUE, Ended.FALSE, Ended.UNSURE, Ended.UNSURE]
            assert ends[3].error == "RuntimeError: the database is away"
            (end,) = await it.run("bad.checked", body(answer="id"), mode=Mode.CHECK, start=77)
            assert end.ended is Ended.TRUE, "a check sees the task's id and fence"
            assert await it.states("bad.nothing", b"{}", mode=Mode.CHECK) == [Ended.UNSURE]

    asyncio.run(act())


def test_a_check_that_kills_its_worker_is_unsure(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path) as it:
            (end,) = await it.run("bad.checked", body(answer="die"), mode=Mode.CHECK)
            assert (end.ended, end.error) == (Ended.UNSURE, "the worker exited with status 9")

    asyncio.run(act())


def test_handlers_know_their_task(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path) as it:
            ends = await it.run("bad.which", b"{}", b"{}", start=9)
            assert [end.results for end in ends] == [(b'["9",5,1]',), (b'["10",5,1]',)]
            ends = await it.run("bad.async_which", b"{}", b"{}", start=9)
            assert [end.results for end in ends] == [(b'"9"',), (b'"10"',)]

    asyncio.run(act())


def test_threads_run_side_by_side_up_to_their_bound(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path / "work", io_threads=8) as it:
            one = body(path=str(tmp_path / "meeting"), others=8)
            assert it.pools.free("io") == 8
            number = it.submit("bad.meet", [one] * 8)
            assert it.pools.free("io") == 0
            assert [end.ended for end in await it.ends(number, 8)] == [DONE] * 8

    asyncio.run(act())


def test_coroutines_run_side_by_side(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path / "work") as it:
            one = body(path=str(tmp_path / "meeting"), others=200)
            assert await it.states("bad.meet_async", *[one] * 200) == [DONE] * 200

    asyncio.run(act())


def test_cpu_work_goes_to_all_workers(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path / "work", cpu_workers=2) as it:
            await until(lambda: it.pools.slots("cpu") == 2, "both workers are ready")
            numbers = [
                it.submit("bad.effect", [body(path=str(tmp_path / "e"), n=n, pause_s=0.2)]) for n in range(2)
            ]
            assert it.pools.free("cpu") == 0
            for number in numbers:
                await it.ends(number, 1)
            assert len({report.pid for report in it.reports}) == 2
            assert it.pools.free("cpu") == 2

    asyncio.run(act())


def test_a_full_journal_makes_work_wait_until_something_is_released(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path, journal_bytes=DATA_AT + 128) as it:
            first = it.submit("bad.nothing", [b"{}"] * 64)
            await it.ends(first, 64)
            second = it.submit("bad.nothing", [b"{}"] * 64)
            await asyncio.sleep(0)
            await it.pools.drain(timeout_s=0.2)
            assert second not in it.ended
            it.pools.release(first, 0, 60)
            it.pools.release(first, 60, 4)
            assert [end.ended for end in await it.ends(second, 64)] == [DONE] * 64
            with pytest.raises(ValueError, match="does not fit the journal"):
                it.submit("bad.nothing", [b"{}"] * 500)

    asyncio.run(act())


def test_nothing_starts_without_a_lease_and_kill_all_returns_what_waits(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path / "work") as it:
            it.pools.set_lease(0)
            waiting = it.submit("bad.nothing", [b"{}"] * 2)
            it.pools.kill_all()
            assert [end.ended for end in await it.ends(waiting, 2)] == [NOT_STARTED] * 2
            it.pools.set_lease(2**62)
            assert await it.states("bad.nothing", b"{}") == [DONE]

    asyncio.run(act())


def test_kill_all_kills_what_runs_and_reports_it_in_doubt(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path / "work") as it:
            effects = tmp_path / "effects"
            number = it.submit("bad.hold_interpreter_long", [body(path=str(effects))])
            await until(lambda: lines(effects), "it runs")
            it.pools.kill_all()
            assert [end.ended for end in await it.ends(number, 1)] == [CRASHED]
            assert not is_running(int(lines(effects)[0]))

    asyncio.run(act())


def test_drain_waits_for_what_was_submitted(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path / "work") as it:
            number = it.submit("bad.effect", [body(path=str(tmp_path / "e"), n=1, pause_s=0.3)])
            assert not await it.pools.drain(timeout_s=0.01)
            assert await it.pools.drain(timeout_s=30)
            assert it.ended[number][0].ended is DONE

    asyncio.run(act())


def test_stop_lets_running_tasks_end_within_the_grace(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path / "work") as it:
            effects = tmp_path / "effects"
            number = it.submit("bad.effect", [body(path=str(effects), n=1, pause_s=0.3)])
            await until(lambda: lines(effects), "it runs")
            await it.pools.stop(grace_s=30)
            assert it.ended[number][0].ended is DONE

    asyncio.run(act())


@pytest.mark.parametrize(
    ("source", "error"),
    [("raise RuntimeError('no database')", "no database"), ("import sys; sys.exit(3)", "SystemExit: 3")],
)
def test_an_application_that_cannot_be_imported_is_an_error_and_no_loop(
    tmp_path: Path, source: str, error: str
) -> None:
    (tmp_path / "broken_application.py").write_text(source)

    async def act() -> None:
        events: list[object] = []
        pools = WorkerPools(
            "broken_application:app",
            str(tmp_path),
            PoolSettings(),
            tmp_path / "work",
            1,
            lambda _: None,
            events.append,
        )
        with pytest.raises(WorkerStartError, match=error):
            await pools.start()

    asyncio.run(act())


def test_workers_that_fail_to_start_later_are_tried_again_ever_more_slowly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "fragile.py"
    good = "from oncekeeper import App\nimport os\napp = App('f')\n@app.task\ndef die() -> None:\n    os._exit(1)\n"
    source.write_text(good)

    async def act() -> None:
        async with bench(tmp_path / "work", app="fragile:app", restart_delay_s=0.05) as it:
            source.write_text("raise RuntimeError('half deployed')\n")
            it.submit("f.die", [b"{}"])
            await until(lambda: len(failures(it)) >= 3, "three attempts")
            found = failures(it)
            assert "half deployed" in found[0].error
            assert [failure.retry_s for failure in found[:3]] == [0.05, 0.1, 0.2]
            source.write_text(good)
            await until(lambda: it.pools.slots("io"), "it is mended")

    def failures(it: Bench) -> list[WorkerFailed]:
        return [event for event in it.events if isinstance(event, WorkerFailed)]

    # bench() gives the repository as the application's directory: workers find the module by the environment.
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    asyncio.run(act())


def test_work_beyond_the_bounds_is_refused(tmp_path: Path) -> None:
    async def act() -> None:
        async with bench(tmp_path) as it:
            work = Work(1, Mode.RUN, "bad.double", Ids(((1, 2),)), 1, 1, 0, (b"{}",))
            with pytest.raises(ValueError, match="1 bodies for 2 ids"):
                it.pools.submit(work)
            large = msgspec.structs.replace(work, ids=Ids(((1, 1),)), bodies=(b"x" * (17 << 20),))
            with pytest.raises(ValueError, match="work_bytes_max"):
                it.pools.submit(large)

    asyncio.run(act())
