"""Schedules over HTTP, against a real ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raft.commands import Done, Fire, PutSchedule, Timetable
from tests.support.http_node import NOW_MS, Caller, FakeNode, run

EVERY_MINUTE = {"schedule": "* * * * *", "handler": "shop.charge", "body": {"order": 5}}


@pytest.fixture
def node(tmp_path: Path) -> FakeNode:
    return FakeNode(tmp_path)


def test_a_schedule_is_put_shown_paused_and_deleted(node: FakeNode) -> None:
    async def test(call: Caller) -> None:
        wanted = {**EVERY_MINUTE, "tz": "Europe/Berlin", "catch_up": "all", "by": "ann", "ttr_ms": 5000}
        put = await call.ask("PUT", "/v1/schedules/tick", json=wanted)
        assert put.status == 200
        shown = (await call.get("/v1/schedules/tick")).body
        assert shown == put.body
        assert {name: shown[name] for name in wanted} == wanted
        assert (shown["owner"], shown["paused"], shown["last"], shown["queue"]) == (
            "hand",
            False,
            None,
            "default",
        )
        assert shown["next"].endswith(":00.000Z")
        paused = await call.post("/v1/schedules/tick/pause", {"by": "bob"})
        assert (paused.body["paused"], paused.body["by"], paused.body["next"]) == (True, "bob", None)
        assert (await call.post("/v1/schedules/tick/resume")).body["paused"] is False
        rows = (await call.get("/v1/schedules")).body
        assert [row["name"] for row in rows["schedules"]] == ["tick"]
        gone = await call.ask("DELETE", "/v1/schedules/tick?by=ann")
        assert (gone.status, gone.body) == (200, {"name": "tick", "deleted": True})
        assert (await call.get("/v1/schedules")).body["schedules"] == []

    run(node, test)


@pytest.mark.parametrize(
    ("change", "field", "said"),
    [
        ({"schedule": "0 0 30 2 *"}, "schedule", "never fires"),
        ({"schedule": "now and then"}, "schedule", "five fields"),
        ({"tz": "Mars/Base"}, "tz", "no known time zone"),
        ({"schedule": "every 5s", "tz": "UTC"}, "tz", "knows no zone"),
        ({"catch_up": "some"}, "catch_up", "must be one of none, latest, all"),
        ({"handler": "shop.nothing"}, "handler", "is not registered"),
        ({"body": [1]}, "body", "must be a JSON object"),
        ({"queue": "a b"}, "queue", "must match"),
        ({"when": "* * * * *"}, "when", "unknown field"),
    ],
)
def test_what_cannot_work_is_refused_with_field_and_rule(
    node: FakeNode, change: dict[str, Any], field: str, said: str
) -> None:
    async def test(call: Caller) -> None:
        answer = await call.ask("PUT", "/v1/schedules/tick", json={**EVERY_MINUTE, **change})
        assert (answer.status, answer.body["field"]) == (400, field), answer.body
        assert said in answer.body["error"]
        assert node.ledger.schedules == {}

    run(node, test)


def test_a_body_that_the_handler_cannot_take_is_refused_when_it_is_put(node: FakeNode) -> None:
    node.wrong_body = (0, "order: expected int, got str")

    async def test(call: Caller) -> None:
        answer = await call.ask("PUT", "/v1/schedules/tick", json=EVERY_MINUTE)
        assert (answer.status, answer.body["error"]) == (400, "body: order: expected int, got str")

    run(node, test)


def test_what_the_code_declares_is_changed_there_but_may_be_paused_by_hand(node: FakeNode) -> None:
    coded = Timetable("* * * * *", "", "shop.charge", "default", b"{}")
    node.apply(PutSchedule("shop.charge", coded, "code", "node n1", NOW_MS))

    async def test(call: Caller) -> None:
        for method in ("PUT", "DELETE"):
            body = {"json": EVERY_MINUTE} if method == "PUT" else {}
            answer = await call.ask(method, "/v1/schedules/shop.charge", **body)
            assert (answer.status, answer.body["outcome"]) == (409, "declared in code")
        assert (await call.post("/v1/schedules/shop.charge/pause")).body["paused"] is True

    run(node, test)


def test_firing_by_hand_runs_the_task_once_more_and_touches_no_times(node: FakeNode) -> None:
    async def test(call: Caller) -> None:
        await call.ask("PUT", "/v1/schedules/tick", json=EVERY_MINUTE)
        await call.post("/v1/schedules/tick/pause")
        before = node.ledger.schedules["tick"]
        start = (await call.post("/v1/ids", {"count": 1})).body["start"]
        for _ in range(2):  # nobody knew whether the first came through
            fired = await call.post("/v1/schedules/tick/fire", {"id": str(start), "by": "ann"})
            assert (fired.status, fired.body) == (200, {"name": "tick", "id": str(start)})
        places = node.log.find(start)
        assert {place.batch.bodies for place in places} == {(b'{"order": 5}',)}
        assert places[0].batch.submitted_by == "schedule tick, fired by ann"
        other = await call.post("/v1/schedules/tick/fire")
        assert other.body["id"] != str(start)
        assert node.ledger.schedules["tick"] == before

    run(node, test)


def test_what_is_not_there_is_not_found(node: FakeNode) -> None:
    async def test(call: Caller) -> None:
        for method, path in [
            ("GET", "tick"), ("DELETE", "tick"), ("POST", "tick/pause"), ("POST", "tick/resume"),
            ("POST", "tick/fire"),
        ]:  # fmt: skip
            answer = await call.ask(method, f"/v1/schedules/{path}")
            assert (answer.status, answer.body["error"]) == (404, "there is no schedule tick")
        assert (await call.get("/v1/schedules/a%20b")).status == 400

    run(node, test)


def test_without_a_quorum_nothing_is_changed_and_the_list_is_said_to_be_old(node: FakeNode) -> None:
    async def test(call: Caller) -> None:
        node.quorum = False
        assert (await call.get("/v1/schedules")).body == {"schedules": [], "stale": True}
        assert (await call.ask("PUT", "/v1/schedules/tick", json=EVERY_MINUTE)).status == 503

    run(node, test)


def test_a_schedule_shows_when_it_fired_last_and_what_was_left_out(node: FakeNode) -> None:
    async def test(call: Caller) -> None:
        node.apply(
            PutSchedule(
                "tick", Timetable("every 1s", "", "shop.charge", "default", b"{}"), "hand", "me", NOW_MS
            )
        )
        revision = node.ledger.schedules["tick"].revision
        assert node.apply(Fire("tick", revision, NOW_MS + 5000, True, 4)) == (Done(),)
        shown = (await call.get("/v1/schedules/tick")).body
        assert (shown["last"], shown["next"]) == ("2026-05-28T20:26:45.000Z", "2026-05-28T20:26:46.000Z")
        assert (shown["fired"], shown["missed"]) == (1, 4)

    run(node, test)
