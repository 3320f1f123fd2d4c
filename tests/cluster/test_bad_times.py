"""Times and schedules that cannot work, from the command line, Python and HTTP: what is said names the field."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from dedup.ids import id_text
from node.cli.output import CliError
from oncekeeper.errors import InvalidTask, Refused
from tests.support.real_cluster import RealCluster, eventually


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealCluster]:
    with RealCluster(tmp_path_factory.mktemp("times"), nodes=1) as running:
        running.start()
        running.wait_up()
        yield running


BODY = {"name": "x"}
FAR = (datetime.now(UTC) + timedelta(days=400)).isoformat()
DUES = {
    "more than a year": (FAR, "366 days"),
    "no zone": ("2026-12-24T18:00:00", "time zone"),
    "no time": ("tomorrow", "ISO 8601"),
}


@pytest.mark.parametrize(("due", "said"), DUES.values(), ids=DUES)
def test_a_due_time_that_cannot_be_is_refused_by_name_wherever_it_is_said(
    cluster: RealCluster, due: str, said: str
) -> None:
    with pytest.raises(CliError, match=f"due: .*{said}"):
        cluster.api().post("/v1/tasks", {"handler": "real.once", "body": BODY, "due": due})
    with pytest.raises(InvalidTask, match=f"due: .*{said}"):
        cluster.client.submit("real.once", BODY, queue="default", due=due)
    refused = cluster.cli("submit", "real.once", "--body", '{"name": "x"}', "--at", due, expect=2)
    assert refused["error"].startswith("at: ")
    assert said in refused["error"]
    waits = _later(cluster)
    with pytest.raises(CliError, match=f"due: .*{said}"):
        cluster.api().post(f"/v1/tasks/{id_text(waits)}/reschedule", {"due": due})
    refused = cluster.cli("task", "reschedule", id_text(waits), "--at", due, expect=2)
    assert said in refused["error"]
    assert cluster.client.cancel(waits) == "cancelled"


def _later(cluster: RealCluster) -> int | bytes:
    (task_id,) = cluster.client.send(
        "real.once", [b'{"name": "later"}'], due_ms=time.time_ns() // 1_000_000 + 3_600_000
    )
    cluster.acknowledged([task_id], "once")
    return task_id


def test_a_due_time_in_the_past_runs_now_and_each_way_of_submitting_says_so(cluster: RealCluster) -> None:
    past = {"handler": "real.once", "body": BODY, "due": "2020-01-01T00:00:00Z"}
    answer = cluster.api().post("/v1/tasks", past)
    assert answer["past"] == 1
    told = cluster.cli("submit", "real.once", "--body", '{"name": "x"}', "--at", past["due"])
    assert told["past"] == 1
    for task in (*answer["ids"], *told["ids"]):
        seen = eventually("it runs", lambda: cluster.api().get(f"/v1/tasks/{task}")["state"] == "executed")  # noqa: B023
        assert seen


SCHEDULES = {
    "a line that never fires": (
        ["--cron", "0 0 30 2 *"],
        {"schedule": "0 0 30 2 *"},
        "schedule",
        "never fires",
    ),
    "no line": (["--cron", "at noon"], {"schedule": "at noon"}, "schedule", "five fields"),
    "an unknown zone": (
        ["--cron", "0 9 * * *", "--tz", "Mars/Base"],
        {"schedule": "0 9 * * *", "tz": "Mars/Base"},
        "tz",
        "no known time zone",
    ),
}


@pytest.mark.parametrize(("words", "wanted", "field", "said"), SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_that_cannot_work_is_refused_by_field_and_is_not_there(
    cluster: RealCluster, words: list[str], wanted: dict[str, str], field: str, said: str
) -> None:
    with pytest.raises(CliError, match=f"{field}: .*{said}"):
        cluster.api().put("/v1/schedules/bad", {"handler": "real.once", "body": BODY, **wanted})
    refused = cluster.cli(
        "schedule", "put", "bad", *words, "--handler", "real.once", "--body", '{"name": "x"}', expect=1
    )
    assert refused["field"] == field
    assert said in refused["error"]
    assert cluster.cli("schedule", "list")["schedules"] == []


def test_a_second_schedule_of_one_name_is_the_first_one_changed(cluster: RealCluster) -> None:
    for hour in ("9", "10"):
        cluster.cli(
            "schedule", "put", "twice", "--cron", f"0 {hour} * * *", "--handler", "real.once",
            "--body", '{"name": "x"}',
        )  # fmt: skip
    (row,) = cluster.cli("schedule", "list")["schedules"]
    assert (row["name"], row["schedule"]) == ("twice", "0 10 * * *")
    cluster.cli("schedule", "delete", "twice")


def test_a_cancel_and_a_reschedule_of_what_runs_or_has_ended_say_its_state(cluster: RealCluster) -> None:
    (task_id,) = cluster.submit("once", do="before:wait")
    cluster.caught(task_id)
    for state in ("running", "executed"):
        with pytest.raises(Refused, match=state):
            cluster.client.cancel(task_id)
        with pytest.raises(Refused, match=state):
            cluster.client.reschedule(task_id, delay="1h")
        for verb in (["cancel"], ["reschedule", "--delay", "1h"]):
            refused = cluster.cli("task", verb[0], id_text(task_id), *verb[1:], expect=1)
            assert state in str(refused), refused
        cluster.release(task_id)
        eventually("it has ended", lambda: cluster.state(task_id) == "executed")
