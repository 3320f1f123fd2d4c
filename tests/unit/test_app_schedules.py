"""Schedules as they are declared in an application's code."""

from __future__ import annotations

import pytest

from node.workers.calls import calls_of
from oncekeeper import App, ApplicationError, InvalidHandler, every


def test_a_schedule_travels_to_the_node_with_its_handler() -> None:
    app = App("shop")

    @app.task(schedule="0  9 * * mon-fri", tz="Europe/Berlin", catch_up="all")
    def report(day: str = "today") -> str:
        return day

    @app.task(schedule=every("1h30m"))
    async def tick() -> None: ...

    @app.task
    def plain(number: int) -> None: ...

    app.verify()
    infos = [calls_of(handler).info for handler in app.handlers.values()]
    assert [(info.schedule, info.tz, info.catch_up) for info in infos] == [
        ("0 9 * * mon-fri", "Europe/Berlin", "all"),
        ("every 90m", "", "latest"),
        ("", "", "latest"),
    ]
    assert report() == "today"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"schedule": "0 0 30 2 *"}, "shop.f: schedule: '0 0 30 2 *': never fires"),
        ({"schedule": "daily"}, "shop.f: schedule: 'daily' must be a cron line of five fields"),
        ({"schedule": 10}, 'shop.f: schedule: must be a cron line or every("10s"), not 10'),
        ({"schedule": "* * * * *", "tz": "Berlin"}, "shop.f: tz: 'Berlin' is no known time zone"),
        ({"schedule": every("1s"), "tz": "UTC"}, "shop.f: tz: 'every 1s' goes by real time"),
        ({"schedule": "* * * * *", "catch_up": "some"}, "shop.f: catch_up: must be one of none, latest, all"),
        ({"tz": "UTC"}, "shop.f: tz and catch_up go with a schedule, and there is none"),
    ],
)
def test_a_schedule_that_cannot_work_is_refused_where_it_is_declared(
    options: dict[str, object], said: str
) -> None:
    with pytest.raises(InvalidHandler) as raised:
        App("shop").task(name="f", **options)(lambda: None)  # type: ignore[call-overload]
    assert str(raised.value).startswith(said)


def test_a_scheduled_handler_must_do_without_arguments() -> None:
    app = App("shop")

    @app.task(schedule="* * * * *")
    def charge(order: int) -> None: ...

    with pytest.raises(ApplicationError, match=r"shop\.charge: its schedule calls it without arguments"):
        app.verify()
