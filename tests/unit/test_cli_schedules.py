"""`oncekeeper schedule`: what is sent, and what is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from node.cli.program import run
from tests.support.cli_server import FakeNode, serving

ROW = {
    "name": "nightly", "schedule": "30 2 * * *", "tz": "Europe/Berlin", "handler": "shop.clean", "queue": "default",
    "body": {}, "ttr_ms": 0, "catch_up": "latest", "owner": "hand", "by": "ann", "paused": False, "revision": 7,
    "last": None, "next": "2026-11-22T01:30:00.000Z", "fired": 0, "missed": 0, "error": None,
}  # fmt: skip
Ask = Callable[..., tuple[int, Any]]


@pytest.fixture
def asking(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Ask:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONCEKEEPER_TOKEN", "t0ken")

    def ask(node: FakeNode, *arguments: str) -> tuple[int, Any]:
        monkeypatch.setenv("ONCEKEEPER_CLUSTER", node.url)
        capsys.readouterr()
        code = run(["schedule", *arguments, "--json"])
        return code, json.loads(capsys.readouterr().out)

    return ask


def test_put_sends_the_whole_schedule(asking: Ask) -> None:
    with serving({"PUT /v1/schedules/nightly": (200, ROW)}) as node:
        code, said = asking(
            node, "put", "nightly", "--cron", "30 2 * * *", "--tz", "Europe/Berlin", "--handler", "shop.clean",
            "--body", '{"days": 30}', "--queue", "slow", "--ttr", "30s", "--catch-up", "all",
        )  # fmt: skip
        assert (code, said) == (0, ROW)
        sent = json.loads(node.asked[0].body)
        assert sent.pop("by")
        assert sent == {
            "schedule": "30 2 * * *", "tz": "Europe/Berlin", "handler": "shop.clean", "body": {"days": 30},
            "queue": "slow", "ttr_ms": 30_000, "catch_up": "all",
        }  # fmt: skip


def test_an_interval_is_put_as_such(asking: Ask) -> None:
    with serving({"PUT /v1/schedules/beat": (200, ROW)}) as node:
        assert asking(node, "put", "beat", "--every", "10s", "--handler", "shop.beat")[0] == 0
        assert json.loads(node.asked[0].body)["schedule"] == "every 10s"


@pytest.mark.parametrize("options", [(), ("--cron", "* * * * *", "--every", "10s")])
def test_put_wants_either_a_cron_line_or_an_interval(asking: Ask, options: tuple[str, ...]) -> None:
    with serving({}) as node:
        code, said = asking(node, "put", "beat", "--handler", "shop.beat", *options)
        assert (code, said["error"]) == (2, "give either --cron or --every")
        assert node.asked == []


def test_what_the_node_refuses_is_a_failure_with_its_field(asking: Ask) -> None:
    refusal = {"error": "tz: 'Mars' is no known time zone", "field": "tz"}
    with serving({"PUT /v1/schedules/beat": (400, refusal)}) as node:
        code, said = asking(
            node, "put", "beat", "--cron", "* * * * *", "--tz", "Mars", "--handler", "shop.beat"
        )
        assert (code, said["error"], said["field"]) == (1, refusal["error"], "tz")


def test_the_others_ask_what_they_are_called(asking: Ask) -> None:
    answers: dict[str, Any] = {
        "GET /v1/schedules": (200, {"schedules": [ROW], "stale": False}),
        "GET /v1/schedules/nightly": (200, ROW),
        "POST /v1/schedules/nightly/pause": (200, {**ROW, "paused": True}),
        "POST /v1/schedules/nightly/resume": (200, ROW),
        "DELETE /v1/schedules/nightly": (200, {"name": "nightly", "deleted": True}),
    }
    with serving(answers) as node:
        for words in (
            ("list",),
            ("show", "nightly"),
            ("pause", "nightly"),
            ("resume", "nightly"),
            ("delete", "nightly"),
        ):
            code, said = asking(node, *words)
            assert code == 0
            assert (code, said) == (
                0,
                answers[f"{node.asked[-1].method} {node.asked[-1].path.partition('?')[0]}"][1],
            )


def test_a_firing_by_hand_has_its_id_before_it_is_asked_for(asking: Ask) -> None:
    answers: dict[str, Any] = {
        "POST /v1/ids": (200, {"start": 77, "count": 1}),
        "POST /v1/schedules/nightly/fire": (200, {"name": "nightly", "id": "77"}),
    }
    with serving(answers) as node:
        assert asking(node, "fire", "nightly") == (0, {"name": "nightly", "id": "77"})
        assert json.loads(node.asked[1].body)["id"] == "77"


def test_a_person_gets_sentences_and_a_table(asking: Ask, capsys: pytest.CaptureFixture[str]) -> None:
    broken = {**ROW, "name": "lost", "next": None, "error": "tz: 'Mars' is no known time zone"}
    answers: dict[str, Any] = {
        "GET /v1/schedules": (200, {"schedules": [ROW, broken], "stale": False}),
        "POST /v1/schedules/nightly/pause": (200, {**ROW, "paused": True}),
        "POST /v1/schedules/nightly/resume": (200, ROW),
    }
    with serving(answers) as node:
        asking(node, "list")
        assert run(["schedule", "list"]) == 0
        said = capsys.readouterr()
        assert "30 2 * * *" in said.out
        assert "2026-11-22T01:30:00.000Z" in said.out
        assert "lost: tz: 'Mars' is no known time zone" in said.err
        run(["schedule", "pause", "nightly"])
        run(["schedule", "resume", "nightly"])
    assert capsys.readouterr().out.splitlines() == [
        "schedule nightly is paused",
        "schedule nightly fires next at 2026-11-22T01:30:00.000Z",
    ]
