"""When a task shall run, as people say it: what is taken, and what is refused with the field and the rule."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from oncekeeper import App
from oncekeeper.arguments import Arguments
from oncekeeper.dues import check_chosen, delay_ms, due_ms, time_chosen
from oncekeeper.errors import ApplicationError, InvalidHandler, InvalidTask

NOW_MS = 1_800_000_000_000


@pytest.mark.parametrize(
    ("given", "ms"),
    [("10s", 10_000), ("30m", 1_800_000), ("1h30m", 5_400_000), ("2d", 172_800_000), (1.5, 1500), (0, 0)],
)
def test_a_delay_is_text_seconds_or_a_timedelta(given: str | float, ms: int) -> None:
    assert delay_ms(given) == ms == delay_ms(timedelta(milliseconds=ms))


@pytest.mark.parametrize(
    "given", ["soon", "", "-5s", "10", -1, "367d", True, float("nan"), timedelta(days=-1)]
)
def test_another_delay_is_refused_naming_it(given: Any) -> None:
    with pytest.raises(InvalidTask) as refused:
        delay_ms(given)
    assert refused.value.field == "delay"


def test_a_due_time_needs_its_zone_and_lies_within_a_year_or_in_the_past() -> None:
    soon = datetime.fromtimestamp(NOW_MS / 1000, UTC) + timedelta(hours=1)
    assert due_ms(soon, NOW_MS) == NOW_MS + 3_600_000 == due_ms(soon.isoformat(), NOW_MS)
    assert due_ms(datetime(1990, 1, 1, tzinfo=UTC), NOW_MS) < NOW_MS
    for wrong in (
        soon.replace(tzinfo=None),
        "2026-12-24T18:00:00",
        soon + timedelta(days=400),
        "tomorrow",
        5,
    ):
        with pytest.raises(InvalidTask) as refused:
            due_ms(cast(Any, wrong), NOW_MS)
        assert refused.value.field == "due"


def test_choices_that_contradict_one_another_are_refused() -> None:
    for choice in ((1, "2030-01-01T00:00:00Z", None), (None, None, "run"), (1, None, "later")):
        with pytest.raises(InvalidTask):
            check_chosen(*cast(Any, choice))
    assert time_chosen(None, None, NOW_MS) == 0
    assert time_chosen("1s", None, NOW_MS) == NOW_MS + 1000


def test_a_second_function_takes_what_was_delayed() -> None:
    app = App("shop")

    @app.task
    def send(to: str) -> str:
        return f"now {to}"

    @send.delayed
    def send_later(to: str) -> str:
        return f"later {to}"

    handler = app.handlers["shop.send"]
    app.verify()
    assert handler.run(Arguments(("eve",), {})) == "now eve" == send("eve")
    assert handler.run(Arguments(("eve",), {}), due_ms=5) == "later eve"
    with pytest.raises(InvalidHandler, match="already"):
        send.delayed(send_later)


def test_a_second_function_must_take_the_same_arguments_and_be_of_the_same_kind() -> None:
    app = App("shop")

    @app.task
    def send(to: str) -> None: ...

    async def other(to: str) -> None: ...

    with pytest.raises(InvalidHandler, match="async"):
        send.delayed(cast(Any, other))
    send.delayed(cast(Any, lambda: None))
    with pytest.raises(ApplicationError, match="delayed tasks must take the same arguments"):
        app.verify()
