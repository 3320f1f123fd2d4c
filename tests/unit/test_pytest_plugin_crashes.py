"""Crash points: true checks pass, lying ones are caught, at the line at which they lie."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from chaos.testing import CrashPoints
from chaos.testing.crashpoints import CrashPointsError
from chaos.testing.places import Place, some_of
from oncekeeper import App, InvalidHandler, checks
from oncekeeper.app import Submitter

crash_points = CrashPoints()


def line_of(text: str) -> int:
    """The number of the one line of this file in which ``text`` stands (but for the tests that ask for it)."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = [at for at, line in enumerate(lines, 1) if text in line and "line_of" not in line]
    return number


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


def clean(home: Path) -> Callable[[], None]:
    def setup() -> None:
        for file in home.iterdir():
            file.unlink()

    return setup


def lines(file: Path) -> Callable[[], int]:
    """How many lines a file has: each is an effect."""
    return lambda: len(file.read_text().splitlines()) if file.exists() else 0


def append(file: str, text: str) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, text.encode())
    os.close(descriptor)


app = App("shop")


@app.task(on_doubt="check")
def send(home: str) -> None:
    """True: it looks at the effect itself."""
    append(home + "/sent", "sent\n")


@send.check
def was_sent(home: str) -> bool:
    return os.path.exists(home + "/sent") and os.path.getsize(home + "/sent") > 0


@app.task(on_doubt="check")
def note_after(home: str) -> None:
    append(home + "/sent", "sent\n")
    open(home + "/done", "w").close()  # the note comes late
    append(home + "/log", "done\n")


@note_after.check
def is_noted(home: str) -> bool:
    return os.path.exists(home + "/done")


@app.task(on_doubt="check")
def note_before(home: str) -> None:
    open(home + "/done", "w").close()
    time.sleep(0)  # noted, and not sent
    append(home + "/sent", "sent\n")


note_before.check(is_noted)


@app.task(on_doubt="check")
def buffered(home: str) -> None:
    file = open(home + "/sent", "w")  # noqa: SIM115 - that is what is wrong with it
    file.write("sent\n")
    open(home + "/done", "w").close()
    time.sleep(0)  # written, but to a buffer
    file.close()


buffered.check(is_noted)


def test_a_true_check_passes_at_every_place(home: Path) -> None:
    report = crash_points(send, {"home": str(home)}, setup=clean(home), effects=lines(home / "sent"))
    assert not report.lies
    assert not report.unsure
    answers = [(each.effect, each.answer) for each in report.findings]
    assert set(answers) == {("none", False), ("once", True)}
    assert "told the truth" in str(report)
    written = [each for each in report.findings if each.place.call == "write"]
    assert [(each.place.line, each.answer) for each in written] == [(line_of("os.write(desc"), True)]


def test_a_check_that_misses_the_effect_is_caught_at_its_line(home: Path) -> None:
    with pytest.raises(AssertionError) as caught:
        crash_points(note_after, {"home": str(home)}, setup=clean(home), effects=lines(home / "sent"))
    text = str(caught.value)
    assert "Its check is_noted lied at" in text
    assert f"{Path(__file__).name}:{line_of('the note comes late')}" in text
    assert "A LIE: the effect stands, and it would run again: it takes effect twice" in text


def test_a_check_that_believes_too_early_is_caught_at_its_line(home: Path) -> None:
    report = crash_points(
        note_before, {"home": str(home)}, setup=clean(home), effects=lines(home / "sent"), fail=False
    )
    assert {each.lie for each in report.lies} == {
        "no effect stands, and it would never run again: the task is lost"
    }
    assert line_of("noted, and not sent") in {each.place.line for each in report.lies}


def test_what_was_written_to_a_buffer_dies_with_the_process(home: Path) -> None:
    arguments = {"home": str(home)}
    real = crash_points(buffered, arguments, setup=clean(home), effects=lines(home / "sent"), fail=False)
    assert line_of("written, but to a buffer") in {each.place.line for each in real.lies}


# --- ready-made checks ----------------------------------------------------------------------------------------


def test_checks_sql_tells_the_truth_before_in_and_after_the_commit(home: Path) -> None:
    file = home / "shop.db"
    engine = sa.create_engine(f"sqlite:///{file}")
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE payments (order_id INTEGER)")
    shop = App("sql")

    @shop.task(on_doubt=checks.sql(engine))
    def charge(order_id: int) -> None:
        with engine.begin() as connection:
            connection.execute(sa.text("INSERT INTO payments VALUES (:id)"), {"id": order_id})

    def payments(order_id: int) -> int:
        # By a connection of its own: the handler's engine must not have to tell of itself.
        with sqlite3.connect(file) as connection:
            found = connection.execute("SELECT count(*) FROM payments WHERE order_id = ?", (order_id,))
            return int(found.fetchone()[0])

    report = crash_points(charge, lambda number: {"order_id": number}, effects=payments)
    assert not report.unsure
    after_commit = [each for each in report.findings if each.place.call == "commit"]
    assert [(each.effect, each.answer) for each in after_commit] == [("once", True)]


def file_task(write: Callable[[str], None]) -> Submitter[Any, Any]:
    files = App("files")

    @files.task(on_doubt=checks.file("{home}/out"))
    def render(home: str) -> None:
        write(home)

    return render


def test_checks_file_tells_the_truth_of_a_file_that_is_renamed_into_place(home: Path) -> None:
    def write(home: str) -> None:
        with open(home + "/out.new", "w") as file:
            file.write("whole")
        os.rename(home + "/out.new", home + "/out")

    task = file_task(write)
    arguments = {"home": str(home)}
    # The file under another name is a part of the effect, and the next run writes over it.
    report = crash_points(task, arguments, setup=clean(home), observe=lambda: contents(home))
    assert "in part" in {each.effect for each in report.findings}
    assert not report.lies


def test_checks_file_takes_half_a_file_for_the_whole_and_is_caught(home: Path) -> None:
    def write(home: str) -> None:
        with open(home + "/out", "w") as file:
            file.write("whole")

    task = file_task(write)
    report = crash_points(
        task, {"home": str(home)}, setup=clean(home), observe=lambda: contents(home), fail=False
    )
    assert {each.lie for each in report.lies} == {
        "a part of the effect stands, and it would never run again: the rest is lost"
    }


def contents(home: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(home.iterdir())}


# --- policies, and checks that cannot tell ----------------------------------------------------------------------


@app.task(on_doubt="rerun")
def overwrite(home: str) -> None:
    Path(home, "sent").write_text("sent\n")


@app.task(on_doubt="rerun")
def add_line(home: str) -> None:
    append(home + "/sent", "sent\n")


@app.task(on_doubt="check")
def doubtful(home: str) -> None:
    append(home + "/sent", "sent\n")


@doubtful.check
def is_sent(home: str) -> bool | None:
    if os.path.exists(home + "/sent"):
        raise ConnectionError("the provider does not answer")
    return None


@app.task
def held(home: str) -> None: ...


def test_a_policy_of_rerun_passes_if_another_run_does_no_harm(home: Path) -> None:
    crash_points(overwrite, {"home": str(home)}, setup=clean(home), effects=lines(home / "sent"))
    with pytest.raises(AssertionError, match="run again, as it asked for, the effect stands: more than once"):
        crash_points(add_line, {"home": str(home)}, setup=clean(home), effects=lines(home / "sent"))


def test_a_check_that_cannot_tell_does_not_lie(home: Path) -> None:
    report = crash_points(doubtful, {"home": str(home)}, setup=clean(home), effects=lines(home / "sent"))
    assert len(report.unsure) == len(report.findings)
    assert {each.error for each in report.findings} == {
        "",
        "ConnectionError: the provider does not answer",
    }
    assert "it could not tell at" in str(report)


def test_a_handler_that_asks_nobody_cannot_be_verified(home: Path) -> None:
    with pytest.raises(InvalidHandler, match='on_doubt="hold" asks nobody'):
        crash_points(held, {"home": str(home)}, effects=lambda: 0)


# --- how it is used -------------------------------------------------------------------------------------------


def test_effects_in_the_tests_own_memory_are_seen_in_its_own_process() -> None:
    charged: list[int] = []
    memory = App("memory")

    @memory.task(on_doubt="check")
    def charge(order_id: int) -> None:
        charged.append(order_id)

    @charge.check
    def was_charged(order_id: int) -> bool:
        return order_id in charged

    def setup() -> None:
        charged.clear()

    report = crash_points(
        charge, {"order_id": 7}, setup=setup, effects=lambda: charged.count(7), in_process=True
    )
    assert {each.effect for each in report.findings} == {"none", "once"}
    with pytest.raises(CrashPointsError, match="effects is 0, and must be 1"):
        crash_points(charge, {"order_id": 7}, setup=setup, effects=lambda: charged.count(7))


@pytest.mark.parametrize("running_loop", [False, True])
def test_coroutines_are_walked_through_too(home: Path, running_loop: bool) -> None:
    beside = App("beside")

    @beside.task(on_doubt="check")
    async def send(home: str) -> None:
        await asyncio.sleep(0)
        append(home + "/sent", "sent\n")
        await asyncio.sleep(0)

    send.check(was_sent)

    def verify() -> None:
        report = crash_points(send, {"home": str(home)}, setup=clean(home), effects=lines(home / "sent"))
        assert {each.effect for each in report.findings} == {"none", "once"}

    async def verify_in_a_loop() -> None:
        verify()

    if running_loop:
        asyncio.run(verify_in_a_loop())
    else:
        verify()


def test_helpers_in_other_modules_can_be_walked_into(
    home: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    module = tmp_path_factory.mktemp("app") / "gateway.py"
    module.write_text(
        "def pay(file):\n    text = 'paid'\n    with open(file, 'w') as out:\n        out.write(text)\n"
    )
    space: dict[str, Any] = {}
    exec(compile(module.read_text(), str(module), "exec"), space)
    other = App("other")

    @other.task(on_doubt="rerun")
    def charge(home: str) -> None:
        space["pay"](home + "/sent")

    without = crash_points(charge, {"home": str(home)}, setup=clean(home), effects=lines(home / "sent"))
    within = crash_points(
        charge, {"home": str(home)}, setup=clean(home), effects=lines(home / "sent"), into=[str(module)]
    )
    assert str(module) not in {each.place.file for each in without.findings}
    assert {each.place.line for each in within.findings if each.place.file == str(module)} >= {2, 3, 4}


def test_a_debugger_or_a_measuring_of_coverage_goes_on_afterwards(home: Path) -> None:
    def trace(frame: object, event: str, argument: object) -> None: ...

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        crash_points(
            send, {"home": str(home)}, setup=clean(home), effects=lines(home / "sent"), in_process=True
        )
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)


# --- bad input ------------------------------------------------------------------------------------------------


def test_an_effect_that_is_left_from_the_run_before_is_told(home: Path) -> None:
    with pytest.raises(
        CrashPointsError, match=r"before run 2 effects is 1 already, and must be 0: give setup="
    ):
        crash_points(send, {"home": str(home)}, effects=lines(home / "sent"))
    clean(home)()
    with pytest.raises(CrashPointsError, match="observe does not answer what it did at first: give setup="):
        crash_points(send, {"home": str(home)}, observe=lambda: contents(home))


def test_a_handler_that_fails_by_itself_is_told_with_its_traceback(home: Path) -> None:
    broken = App("broken")

    @broken.task(on_doubt="rerun")
    def fail(home: str) -> None:
        raise KeyError("no such order")

    with pytest.raises(
        CrashPointsError, match=r"does not end well without any crash:\n(.*\n)*.*no such order"
    ):
        crash_points(fail, {"home": str(home)}, effects=lambda: 0)


def test_a_handler_that_hangs_is_ended(home: Path) -> None:
    broken = App("broken")

    @broken.task(on_doubt="rerun")
    def hang(home: str) -> None:
        time.sleep(600)

    with pytest.raises(CrashPointsError, match=r"a whole run: it did not end within 0\.5 s"):
        CrashPoints(timeout_s=0.5)(hang, {"home": str(home)}, effects=lambda: 0)


def test_the_effect_must_be_measured_in_one_way(home: Path) -> None:
    with pytest.raises(TypeError, match=r"give one of effects=\.\.\. and observe="):
        crash_points(send, {"home": str(home)})
    with pytest.raises(CrashPointsError, match="observe answers what it did before"):
        crash_points(send, {"home": str(home)}, setup=clean(home), observe=lambda: 1)


# --- which places ---------------------------------------------------------------------------------------------


def test_a_loop_is_walked_through_at_its_first_and_last_turn_and_some_between(home: Path) -> None:
    loops = App("loops")

    @loops.task(on_doubt="rerun")
    def copy(home: str) -> None:
        for _ in range(1000):
            pass
        append(home + "/sent", "sent\n")

    task = CrashPoints(places_max=20)
    with pytest.raises(AssertionError) as caught:
        task(copy, {"home": str(home)}, setup=clean(home), effects=lines(home / "sent"))
    assert "was killed at 20 of 20" in str(caught.value)


places = st.lists(st.builds(Place, st.just("line"), st.just("f"), st.integers(1, 9)), max_size=300)


@given(walked=places, most=st.integers(1, 50))
def test_places_are_thinned_evenly_and_in_order(walked: list[Place], most: int) -> None:
    chosen = some_of(walked, most)
    assert len(chosen) == min(most, len(walked))
    assert chosen == sorted(set(chosen))
    if most >= 2 * len(set(walked)):
        assert {walked[at] for at in chosen} == set(walked)
