"""The HTTP API over a real server on loopback: who may speak, what is taken, what is answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dedup.ids import Ids, id_text, keyed_id, parse_id
from node.config import Address
from node.http.peers import PeerClient
from node.http.server import HttpServer
from node.http.submit import TASKS_MAX
from node.http.wire import BODY_BYTES_MAX
from node.records import Attempt, Ending
from oncekeeper.envelope import encode_task
from oncekeeper.log.port import Aside, UnknownAppend, Unsent
from raft.commands import AllocateIds, Cancel, Result, Rule, Verdict
from tests.support.http_node import NOW_MS, TOKEN, Caller, FakeNode, handler, one, run, settled

TASK = {"handler": "shop.charge", "body": {"order_id": 1}}


@pytest.fixture
def node(tmp_path: Path) -> FakeNode:
    return FakeNode(tmp_path)


def attempt(ids: Ids, **changes: Any) -> Attempt:
    fields: dict[str, Any] = {
        "queue": "default", "handler": "shop.charge", "node": "n1", "fence": 5, "attempt": 1,
        "claimed_ms": NOW_MS, "started_ms": NOW_MS, "ended_ms": NOW_MS + 5, "ending": Ending.DONE,
    }  # fmt: skip
    return Attempt(ids=ids, **(fields | changes))


# --- who may speak ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [None, "", "b" * 64, TOKEN[:-1], TOKEN + "a", "\xe9"])
def test_without_the_token_nothing_is_told_or_done(node: FakeNode, token: str | None) -> None:
    async def test(call: Caller) -> None:
        for method, path in (("GET", "/v1/status"), ("POST", "/v1/tasks"), ("GET", "/v1/nothing")):
            answer = await call.ask(method, path, token=token)
            assert (answer.status, answer.body["field"]) == (401, "Authorization")
        assert node.log.ends() == {0: 0, 1: 0, 2: 0}

    run(node, test)


def test_health_needs_no_token_and_tells_nothing_of_use(node: FakeNode) -> None:
    async def test(call: Caller) -> None:
        answer = await call.get("/v1/health", token=None)
        assert (answer.status, answer.body) == (200, {"ok": True, "takes_work": True})

    run(node, test)


@pytest.mark.parametrize(("host", "status"), [
    ("evil.example", 400), ("127.0.0.1.evil.example:80", 400), ("", 400), ("[::1", 400),
    ("localhost:9", 200), ("127.0.0.1", 200), ("[::1]:9", 200),
])  # fmt: skip
def test_a_rebound_host_name_is_refused(node: FakeNode, host: str, status: int) -> None:
    async def test(call: Caller) -> None:
        answer = await call.get("/v1/health", token=None, headers={"Host": host})
        assert answer.status == status
        assert "Access-Control-Allow-Origin" not in answer.headers

    run(node, test)


def test_a_taken_port_is_an_error_of_its_own(node: FakeNode) -> None:
    async def test(call: Caller) -> None:
        with pytest.raises(OSError):
            await HttpServer(node, Address("127.0.0.1", call.port), TOKEN).start()

    run(node, test)


def test_what_is_not_served_is_an_error_in_json(node: FakeNode) -> None:
    async def test(call: Caller) -> None:
        assert (await call.get("/v1/nothing")).status == 404
        answer = await call.ask("DELETE", "/v1/status")
        assert (answer.status, answer.body["field"]) == (405, None)
        answer = await call.get("/v1/status?colour=red")
        assert (answer.status, answer.body["field"]) == (400, "colour")

    run(node, test)


# --- submitting ---------------------------------------------------------------------------------------------


def test_a_task_is_stored_under_an_allocated_id_before_the_answer(node: FakeNode) -> None:
    async def test(call: Caller) -> None:
        answer = await call.post("/v1/tasks", TASK)
        assert (answer.status, answer.body) == (200, {"ids": ["1"], "duplicates": 0})
        (place,) = node.log.find(1)
        assert place.batch.bodies == (b'{"order_id": 1}',)
        assert place.batch.submitted_ms > 0
        assert place.batch.submitted_by.startswith("HTTP from 127.0.0.1")

    run(node, test)


def test_many_tasks_of_a_kind_rest_as_one_batch(node: FakeNode) -> None:
    async def test(call: Caller) -> None:
        answer = await call.post("/v1/tasks", {"tasks": [TASK] * 100})
        assert answer.body["ids"] == [str(number) for number in range(1, 101)]
        lines = b"\n".join([b'{"handler":"shop.charge","body":{}}'] * 3) + b"\n\n"
        ndjson = {"Content-Type": "application/x-ndjson"}
        answer = await call.ask("POST", "/v1/tasks", data=lines, headers=ndjson)
        assert answer.body["ids"] == ["101", "102", "103"]
        assert sum(node.log.ends().values()) == 103
        assert len(node.log.find(50)) == 1

    run(node, test)


def test_a_key_submitted_again_is_one_task(node: FakeNode) -> None:
    task_id = keyed_id("default", "order-1")

    async def test(call: Caller) -> None:
        keyed = TASK | {"key": "order-1"}
        answer = await call.post("/v1/tasks", {"tasks": [keyed, keyed]})
        assert answer.body == {"ids": [id_text(task_id)] * 2, "duplicates": 1}
        node.settle(node.join(), one(task_id), Result.DONE)
        answer = await call.post("/v1/tasks", keyed)
        assert answer.body == {"ids": [id_text(task_id)], "duplicates": 1}
        assert len(node.log.find(task_id)) == 1, "what is executed needs no second place in the log"

    run(node, test)


def test_a_task_that_names_no_queue_goes_to_its_handlers_own(node: FakeNode) -> None:
    node.handlers = {"shop.charge": handler("shop.charge", queue="mail")}

    async def test(call: Caller) -> None:
        answer = await call.post(
            "/v1/tasks", {"tasks": [TASK, TASK | {"key": "k"}, TASK | {"queue": "other"}]}
        )
        assert answer.body["ids"][1] == id_text(keyed_id("mail", "k"))
        queues = [node.log.find(parse_id(text))[0].batch.queue for text in answer.body["ids"]]
        assert queues == ["mail", "mail", "other"]
        wrong = TASK | {"key": "k", "id": id_text(keyed_id("default", "k"))}
        assert (await call.post("/v1/tasks", wrong)).body["field"] == "id"

    run(node, test)


@pytest.mark.parametrize(("task", "field", "rule"), [
    ({"body": {}}, "handler", "missing"),
    ({"handler": "shop.charge"}, "body", "missing"),
    (TASK | {"body": [1]}, "body", "must be a JSON object"),
    (TASK | {"handler": "shop.chrage"}, "handler", "the application has: shop.charge"),
    (TASK | {"ttr_ms": -1}, "ttr_ms", "from 0"),
    (TASK | {"ttr_ms": "1"}, "ttr_ms", "expected int"),
    (TASK | {"key": ""}, "key", "1 to"),
    (TASK | {"key": "x" * 600}, "key", "1 to"),
    (TASK | {"id": "99999"}, "id", "outside every allocated range"),
    (TASK | {"id": "0"}, "id", "from 1"),
    (TASK | {"id": "k12"}, "id", "hexadecimal"),
    (TASK | {"attempt": 2}, "attempt", "must be 1"),
    (TASK | {"queue": "a b"}, "queue", "must match"),
    (TASK | {"due": "tomorrow"}, "due", "ISO 8601"),
    (TASK | {"traceparent": "x"}, "traceparent", "W3C"),
    (TASK | {"v": 2}, "v", "understands 1"),
    (TASK | {"colour": "red"}, "colour", "unknown field"),
    (TASK | {"body": {"blob": "x" * 300_000}}, "body", "pass a reference"),
])  # fmt: skip
@pytest.mark.parametrize("bulk", [False, True])
def test_bad_input_names_the_field_and_the_rule_and_stores_nothing(
    node: FakeNode, task: dict[str, Any], field: str, rule: str, bulk: bool
) -> None:
    async def test(call: Caller) -> None:
        answer = await call.post("/v1/tasks", {"tasks": [TASK, task]} if bulk else task)
        assert (answer.status, answer.body["field"]) == (400, f"tasks[1].{field}" if bulk else field)
        assert rule in answer.body["error"]
        assert sum(node.log.ends().values()) == 0

    run(node, test)


@pytest.mark.parametrize(("raw", "field"), [
    (b"", "body"), (b"[]", "body"), (b"{", "body"), (b"\xff\xfe", "body"),
    (b'{"tasks":[]}', "tasks"), (b'{"tasks":1}', "body"), (b'{"tasks":[],"by":1}', "by"),
])  # fmt: skip
def test_what_is_no_submission_is_refused(node: FakeNode, raw: bytes, field: str) -> None:
    async def test(call: Caller) -> None:
        json_type = {"Content-Type": "application/json"}
        answer = await call.ask("POST", "/v1/tasks", data=raw, headers=json_type)
        assert (answer.status, answer.body["field"]) == (400, field)

    run(node, test)


def test_a_body_that_does_not_fit_the_handler_is_named_by_its_place(node: FakeNode) -> None:
    node.wrong_body = (1, "order_id: expected int, got str")

    async def test(call: Caller) -> None:
        answer = await call.post("/v1/tasks", {"tasks": [TASK, TASK]})
        assert (answer.status, answer.body["field"]) == (400, "tasks[1].body")
        assert "order_id: expected int" in answer.body["error"]

    run(node, test)


def test_too_much_for_one_call_is_refused_unread(node: FakeNode) -> None:
    async def test(call: Caller) -> None:
        ndjson = {"Content-Type": "application/x-ndjson"}
        answer = await call.ask("POST", "/v1/tasks", data=b"1\n" * (TASKS_MAX + 1), headers=ndjson)
        assert (answer.status, answer.body["field"]) == (413, "tasks")
        answer = await call.ask("POST", "/v1/tasks", data=b" " * (BODY_BYTES_MAX + 1))
        assert (answer.status, answer.body["field"]) == (413, "body")

    run(node, test)


def test_a_failed_append_says_whether_anything_may_be_stored(node: FakeNode) -> None:
    async def test(call: Caller) -> None:
        node.append_raises = Unsent("the disk is full")
        answer = await call.post("/v1/tasks", TASK)
        assert (answer.status, answer.body["unknown"]) == (503, False)
        node.append_raises = UnknownAppend("the commit did not return")
        answer = await call.post("/v1/tasks", TASK)
        assert (answer.status, answer.body["unknown"], answer.body["ids"]) == (504, True, ["2"])
        node.append_raises = None
        answer = await call.post("/v1/tasks", TASK | {"id": "2"})
        assert answer.body == {"ids": ["2"], "duplicates": 0}

    run(node, test)


def test_without_a_quorum_a_submission_is_surely_not_stored(node: FakeNode) -> None:
    async def test(call: Caller) -> None:
        node.quorum = False
        answer = await call.post("/v1/tasks", TASK)
        assert (answer.status, answer.body["unknown"]) == (503, False)
        node.quorum, node.unknown = True, True
        answer = await call.post("/v1/tasks", TASK)
        assert (answer.status, answer.body["unknown"]) == (503, False), (
            "ids may be lost; the task is not stored"
        )
        assert sum(node.log.ends().values()) == 0

    run(node, test)


def test_ids_are_allocated_for_clients_that_write_the_log(node: FakeNode) -> None:
    async def test(call: Caller) -> None:
        assert (await call.post("/v1/ids", {"count": 10})).body == {"start": 1, "count": 10}
        assert (await call.post("/v1/ids", {"count": 5})).body == {"start": 11, "count": 5}
        for bad in ({"count": 0}, {"count": 1 << 40}, {"count": "x"}, {}):
            answer = await call.post("/v1/ids", bad)
            assert (answer.status, answer.body["field"]) == (400, "count")

    run(node, test)


# --- the merged views ---------------------------------------------------------------------------------------


def test_a_dead_peer_is_named_and_its_partitions_count_as_waiting(node: FakeNode) -> None:
    node.peers = {"n2": "127.0.0.1:9", "n3": "127.0.0.1:10"}
    report = node.local_status()
    peer = {
        **{name: getattr(report, name) for name in report.__struct_fields__},
        "node": "n2", "partitions": [{"partition": 1, "position": 0, "frontier": 0, "running": 1}],
    }  # fmt: skip
    node.answers["n2"] = lambda method, path: peer
    node.reports = {0: settled(0, 0)}

    async def test(call: Caller) -> None:
        await call.post("/v1/tasks", {"tasks": [TASK] * 9})
        ends = node.log.ends()
        node.reports = {0: settled(0, ends[0])}
        body = (await call.get("/v1/status")).body
        assert body["unreachable"] == ["n3"]
        assert body["tasks"] == {
            "waiting": ends[1] + ends[2], "delayed": 0, "running": 1, "suspect": 0, "executed": 0, "dead": 0,
            "cancelled": 0,
        }  # fmt: skip
        assert [row["owner"] for row in body["partitions"]] == ["n1", "n2", None]
        assert body["idle"] is False
        nodes = (await call.get("/v1/nodes")).body
        assert [(row["node"], row["up"]) for row in nodes["nodes"] if "up" in row] == [
            ("n1", True),
            ("n3", False),
        ]

    run(node, test)


def test_idle_is_said_when_all_is_settled_and_everybody_is_heard(node: FakeNode) -> None:
    async def test(call: Caller) -> None:
        assert (await call.get("/v1/status")).body["idle"] is True
        await call.post("/v1/tasks", TASK)
        assert (await call.get("/v1/status")).body["idle"] is True, "the fake says that it was settled"
        node.reports = {p: settled(p, end, suspect=1) for p, end in node.log.ends().items()}
        assert (await call.get("/v1/status")).body["idle"] is True, "suspects may remain"
        for count in ("waiting", "delayed", "running"):
            node.reports = {p: settled(p, end, **{count: 1}) for p, end in node.log.ends().items()}
            assert (await call.get("/v1/status")).body["idle"] is False
        node.reports = None
        node.quorum = False
        body = (await call.get("/v1/status")).body
        assert (body["idle"], body["fresh"]) == (False, False)

    run(node, test)


def test_a_task_submitted_while_the_reports_are_gathered_is_not_missed(node: FakeNode) -> None:
    async def test(call: Caller) -> None:
        await call.post("/v1/tasks", TASK)
        batch = node.log.find(1)[0].batch
        node.before_report = lambda: node.log.append([batch])
        body = (await call.get("/v1/status")).body
        assert (body["tasks"]["waiting"], body["idle"]) == (1, False)

    run(node, test)


def test_a_revived_task_that_no_partition_has_yet_is_waiting(node: FakeNode) -> None:
    async def test(call: Caller) -> None:
        await call.post("/v1/tasks", TASK)
        node.apply(Cancel(one(1), "ana"))
        assert (await call.get("/v1/status")).body["idle"] is True
        await call.post("/v1/tasks/1/retry")
        body = (await call.get("/v1/status")).body
        assert (body["tasks"]["waiting"], body["idle"]) == (1, False), (
            "it lies aside, on its way into the log"
        )

    run(node, test)


def test_a_report_from_before_a_ruling_does_not_count_as_quiet(node: FakeNode) -> None:
    node.peers = {"n2": "127.0.0.1:9"}
    behind = node.local_status()
    fields = {name: getattr(behind, name) for name in behind.__struct_fields__}
    node.answers["n2"] = lambda method, path: {**fields, "node": "n2"}
    node.reports = {}

    async def test(call: Caller) -> None:
        assert (await call.get("/v1/status")).body["idle"] is True
        node.apply(AllocateIds(1))
        assert (await call.get("/v1/status")).body["idle"] is False

    run(node, test)


# --- one task -----------------------------------------------------------------------------------------------


def test_a_task_is_seen_with_the_history_of_every_node_that_answers(node: FakeNode) -> None:
    node.peers = {"n2": "127.0.0.1:9", "n3": "127.0.0.1:10"}
    node.answers["n2"] = lambda method, path: {
        "attempts": [
            {
                "ids": [[[1, 1]], []], "queue": "default", "handler": "shop.charge", "node": "n2", "fence": 3,
                "attempt": 1, "claimed_ms": NOW_MS, "started_ms": NOW_MS, "ended_ms": NOW_MS + 1, "ending": 2,
                "error": "ValueError: no",
            }
        ],
        "events": [],
    }  # fmt: skip

    async def test(call: Caller) -> None:
        await call.post("/v1/tasks", TASK)
        session = node.join("n1")
        fence = node.settle(session, one(1), Result.DONE)
        node.records.add_attempts([attempt(one(1), fence=fence, attempt=2, results=(b'{"paid":5}',))])
        body = (await call.get("/v1/tasks/1")).body
        assert (body["state"], body["handler"], body["body"]) == ("executed", "shop.charge", {"order_id": 1})
        assert [(a["node"], a["ending"], a["result"]) for a in body["attempts"]] == [
            ("n2", "retry", None),
            ("n1", "done", {"paid": 5}),
        ]
        assert body["unreachable"] == ["n3"]
        story = (await call.get("/v1/tasks/1/why")).body["story"]
        assert any("Node n2 claimed it" in sentence for sentence in story)
        assert story[-1] == "No answer came from n3, so what only n3 knew is missing here."

    run(node, test)


@pytest.mark.parametrize("path", ["/v1/tasks/{}", "/v1/tasks/{}/why", "/v1/tasks/{}/result"])
def test_an_id_that_nobody_knows_is_404_and_a_malformed_one_400(node: FakeNode, path: str) -> None:
    async def test(call: Caller) -> None:
        node.apply(AllocateIds(10))
        for unknown in ("5", "999", "k" + "0" * 32):
            assert (await call.get(path.format(unknown))).status == 404
        for malformed in ("x", "0", "-1", "k00", "9" * 40):
            answer = await call.get(path.format(malformed))
            assert (answer.status, answer.body["field"]) == (400, "id")

    run(node, test)


def test_a_result_is_fetched_from_the_node_that_ran_the_task(node: FakeNode) -> None:
    other = {
        "ids": [[[1, 1]], []], "queue": "q", "handler": "h", "node": "n2", "fence": 3, "attempt": 1,
        "claimed_ms": 1, "started_ms": 1, "ended_ms": 2, "ending": 1, "results": ["eyJwYWlkIjo1fQ=="],
    }  # fmt: skip
    node.peers = {"n2": "127.0.0.1:9"}

    async def test(call: Caller) -> None:
        await call.post("/v1/tasks", TASK)
        body = (await call.get("/v1/tasks/1/result?wait_ms=10")).body
        assert (body["state"], body["done"], body["known"]) == ("waiting", False, False)
        node.settle(node.join("n2"), one(1), Result.DONE)
        node.answers["n2"] = lambda method, path: {"attempts": [other], "events": []}
        body = (await call.get("/v1/tasks/1/result")).body
        assert (body["state"], body["known"], body["result"]) == ("executed", True, {"paid": 5})
        del node.answers["n2"]
        body = (await call.get("/v1/tasks/1/result")).body
        assert (body["state"], body["done"], body["known"], body["unreachable"]) == (
            "executed",
            True,
            False,
            ["n2"],
        )
        answer = await call.get("/v1/tasks/1/result?wait_ms=-1")
        assert (answer.status, answer.body["field"]) == (400, "wait_ms")

    run(node, test)


def test_a_result_that_was_lost_or_could_not_be_kept_is_not_known(node: FakeNode) -> None:
    async def test(call: Caller) -> None:
        await call.post("/v1/tasks", {"tasks": [TASK, TASK]})
        session = node.join()
        node.settle(session, one(1), Result.DOUBT)
        node.apply(Rule(one(1), Verdict.EXECUTED, "check", "the check found its effect"))
        body = (await call.get("/v1/tasks/1/result")).body
        assert (body["state"], body["known"]) == ("executed", False)
        assert "settled by evidence" in body["note"]
        fence = node.settle(session, one(2), Result.DONE)
        error = "the result was dropped: it has no JSON form"
        ended = Attempt(one(2), "default", "shop.charge", "n2", fence, 1, 1, 1, 2, Ending.DONE, None, error)
        node.records.add_attempts([ended])
        body = (await call.get("/v1/tasks/2/result")).body
        assert (body["known"], body["note"]) == (False, f"it took effect, and {error}")

    run(node, test)


# --- steering -----------------------------------------------------------------------------------------------


def test_a_waiting_task_is_cancelled_and_a_started_one_is_too_late(node: FakeNode) -> None:
    async def test(call: Caller) -> None:
        await call.post("/v1/tasks", {"tasks": [TASK] * 5})
        assert (await call.post("/v1/tasks/1/cancel", {"by": "ana"})).body["outcome"] == "cancelled"
        assert (await call.post("/v1/tasks/1/cancel")).body["state"] == "cancelled", "asking again is safe"
        session = node.join()
        node.claim(session, one(2))
        node.settle(session, one(3), Result.DONE)
        node.settle(session, one(4), Result.DEAD)
        node.settle(session, one(5), Result.DOUBT)
        for number, state in ((2, "running"), (3, "executed"), (4, "dead"), (5, "suspect")):
            answer = await call.post(f"/v1/tasks/{number}/cancel")
            assert (answer.status, answer.body["outcome"], answer.body["state"]) == (409, "too late", state)
        assert (await call.post("/v1/tasks/99999/cancel")).status == 404
        assert (await call.post("/v1/tasks/1/cancel", {"who": 1})).body["field"] == "who"
        rows = (await call.get("/v1/tasks?state=cancelled")).body["tasks"]
        assert [row["id"] for row in rows] == ["1"]

    run(node, test)


def test_an_unknown_outcome_is_told_apart_from_a_refusal(node: FakeNode) -> None:
    async def test(call: Caller) -> None:
        await call.post("/v1/tasks", TASK)
        node.unknown = True
        answer = await call.post("/v1/tasks/1/cancel")
        assert (answer.status, answer.body["unknown"]) == (504, True)
        node.quorum = False
        answer = await call.post("/v1/tasks/1/cancel")
        assert (answer.status, answer.body["unknown"]) == (503, False)

    run(node, test)


@pytest.mark.parametrize("crash", ["never", "before the revival is answered"])
def test_a_cancelled_task_is_brought_back_into_the_log(node: FakeNode, crash: str) -> None:
    async def test(call: Caller) -> None:
        await call.post("/v1/tasks", TASK)
        node.apply(Cancel(one(1), "ana"))
        node.log.commit(node.log.ends())
        node.unknown = crash != "never"
        answer = await call.post("/v1/tasks/1/retry", {"by": "bob"})
        assert answer.status == (200 if crash == "never" else 504)
        node.sweep()
        places = [
            place for place in node.log.find(1) if place.offset >= node.log.committed()[place.partition]
        ]
        assert len(places) == 1, "it stands in the log again, to be read"
        assert node.log.find_aside(one(1)) == []
        node.unknown = False
        answer = await call.post("/v1/tasks/1/retry")
        assert (answer.status, answer.body["state"]) == (409, "waiting")

    run(node, test)


def test_a_task_that_is_not_dead_is_not_retried(node: FakeNode) -> None:
    async def test(call: Caller) -> None:
        await call.post("/v1/tasks", {"tasks": [TASK] * 3})
        session = node.join()
        node.claim(session, one(1))
        node.settle(session, one(2), Result.DONE)
        node.settle(session, one(3), Result.DOUBT)
        for number, state in ((1, "running"), (2, "executed"), (3, "suspect")):
            answer = await call.post(f"/v1/tasks/{number}/retry")
            assert (answer.status, answer.body["state"]) == (409, state)
        assert (await call.post("/v1/tasks/99999/retry")).status == 404

    run(node, test)


def test_a_dead_letter_is_listed_with_its_reason_and_brought_back(node: FakeNode) -> None:
    async def test(call: Caller) -> None:
        await call.post("/v1/tasks", TASK)
        message = encode_task(node.log.find(1)[0].batch)
        node.log.put_aside([Aside("dead", 1, message, "ValueError: no such account", NOW_MS)])
        assert (await call.get("/v1/tasks?state=dead")).body["tasks"] == [], "put aside, and not settled yet"
        node.settle(node.join(), one(1), Result.DEAD)
        (row,) = (await call.get("/v1/tasks?state=dead&error=ACCOUNT&handler=shop.charge")).body["tasks"]
        assert (row["id"], row["error"], row["attempt"]) == ("1", "ValueError: no such account", 1)
        assert (await call.get("/v1/tasks?state=dead&queue=mail")).body["tasks"] == []
        body = (await call.get("/v1/tasks/1/result")).body
        assert (body["state"], body["error"]) == ("dead", "ValueError: no such account")
        assert (await call.post("/v1/tasks/1/retry")).body["outcome"] == "revived"
        assert (await call.get("/v1/tasks?state=dead")).body["tasks"] == []
        node.sweep()
        assert len(node.log.find(1)) == 2

    run(node, test)


def test_a_dead_task_whose_message_is_gone_is_not_revived(node: FakeNode) -> None:
    async def test(call: Caller) -> None:
        node.apply(AllocateIds(1))
        node.settle(node.join(), one(1), Result.DEAD)
        answer = await call.post("/v1/tasks/1/retry")
        assert (answer.status, answer.body["outcome"]) == (409, "gone")
        assert node.ledger.describe(1).state == "dead", "revived without a message it would wait for ever"

    run(node, test)


def test_suspects_are_listed_with_pages_and_ruled_in_bulk(node: FakeNode) -> None:
    async def test(call: Caller) -> None:
        await call.post("/v1/tasks", {"tasks": [TASK] * 4})
        session = node.join()
        node.settle(session, Ids(((1, 3),)), Result.DOUBT)
        node.apply(Rule(one(2), Verdict.HELD, "policy:hold", "ask somebody"))
        page = (await call.get("/v1/suspects?limit=2")).body
        assert [(row["id"], row["held"]) for row in page["suspects"]] == [("1", False), ("2", True)]
        assert {(row["handler"], row["queue"]) for row in page["suspects"]} == {("shop.charge", "default")}
        assert (page["next"], page["total"], page["held"]) == ("2", 3, 1)
        page = (await call.get("/v1/suspects?limit=2&after=2")).body
        assert ([row["id"] for row in page["suspects"]], page["next"]) == (["3"], None)
        ruling = {
            "ids": ["1", "2", "4", "1"],
            "verdict": "executed",
            "by": "ana",
            "reason": "seen in the bank",
        }
        body = (await call.post("/v1/suspects/rule", ruling)).body
        assert (body["ruled"], [row["outcome"] for row in body["outcomes"]]) == (
            2,
            ["ruled", "ruled", "no suspect"],
        )
        story = (await call.get("/v1/tasks/1/why")).body["story"]
        assert any(sentence.startswith("ana, a human, settled the doubt") for sentence in story)
        assert (await call.post("/v1/suspects/rule", ruling)).status == 409

    run(node, test)


@pytest.mark.parametrize(("change", "field"), [
    ({"verdict": "maybe"}, "verdict"), ({"ids": []}, "ids"), ({"ids": ["x"]}, "ids[0]"), ({"ids": "1"}, "ids"),
    ({"by": "x" * 300}, "by"), ({"reason": "x" * 3000}, "reason"), ({"more": 1}, "more"),
])  # fmt: skip
def test_a_bad_ruling_is_named(node: FakeNode, change: dict[str, Any], field: str) -> None:
    async def test(call: Caller) -> None:
        ruling = {"ids": ["1"], "verdict": "executed"} | change
        answer = await call.post("/v1/suspects/rule", ruling)
        assert (answer.status, answer.body["field"]) == (400, field)

    run(node, test)


def test_a_queue_is_paused_and_resumed(node: FakeNode) -> None:
    async def test(call: Caller) -> None:
        assert (await call.post("/v1/queues/mail/pause", {"by": "ana"})).body == {
            "queue": "mail",
            "paused": True,
        }
        assert node.ledger.paused("mail")
        rows = {row["queue"]: row for row in (await call.get("/v1/queues")).body["queues"]}
        assert (rows["mail"]["paused"], rows["mail"]["by"], rows["default"]["paused"]) == (True, "ana", False)
        assert rows["default"]["handlers"] == ["shop.charge"]
        assert (await call.get("/v1/status")).body["paused_queues"] == ["mail"]
        await call.post("/v1/queues/mail/resume")
        assert not node.ledger.paused("mail")
        answer = await call.post("/v1/queues/a%20b/pause")
        assert (answer.status, answer.body["field"]) == (400, "queue")

    run(node, test)


# --- finding ------------------------------------------------------------------------------------------------


def test_tasks_are_found_by_state(node: FakeNode) -> None:
    async def test(call: Caller) -> None:
        await call.post("/v1/tasks", {"tasks": [TASK] * 6})
        session = node.join()
        node.claim(session, one(1))
        node.settle(session, one(2), Result.DOUBT)
        fence = node.settle(session, one(3), Result.DONE)
        node.records.add_attempts([attempt(one(3), fence=fence)])
        node.settle(session, one(4), Result.RETRY, delay_ms=60_000)
        expected = {"waiting": ["5", "6"], "running": ["1"], "suspect": ["2"], "executed": ["3"], "delayed": ["4"],
                    "dead": [], "cancelled": []}  # fmt: skip
        for state, ids in expected.items():
            body = (await call.get(f"/v1/tasks?state={state}")).body
            assert (sorted(row["id"] for row in body["tasks"]), body["next"]) == (ids, None)
        assert (await call.get("/v1/tasks?state=waiting&queue=mail")).body["tasks"] == []

    run(node, test)


def test_history_pages_over_all_nodes_give_every_task_once(node: FakeNode, tmp_path: Path) -> None:
    other = FakeNode(tmp_path, "n2", node.ledger)
    node.apply(AllocateIds(20))
    node.settle(node.join(), Ids(((1, 20),)), Result.DONE)
    node.records.add_attempts(
        [attempt(one(6), ended_ms=NOW_MS), attempt(Ids(((1, 5),)), ended_ms=NOW_MS + 9)]
    )
    other.records.add_attempts([attempt(Ids(((11, 4),)), node="n2", ended_ms=NOW_MS + 5)])

    async def test(call: Caller) -> None:
        server = HttpServer(other, Address("127.0.0.1", 0), TOKEN)
        client = PeerClient({"n2": f"127.0.0.1:{await server.start()}"}, TOKEN)
        node.peers = {"n2": "by the client's own address"}
        node.ask_peer = client.ask  # type: ignore[method-assign]
        seen: list[str] = []
        after: str | None = ""
        while after is not None and len(seen) < 50:
            body = (await call.get(f"/v1/tasks?state=executed&limit=3&after={after}")).body
            seen += [row["id"] for row in body["tasks"]]
            after = body["next"]
        await client.close()
        await server.stop()
        other.records.close()
        assert seen == ["1", "2", "3", "4", "5", "11", "12", "13", "14", "6"]

    run(node, test)


@pytest.mark.parametrize(("query", "field"), [
    ("state=lost", "state"), ("limit=0", "limit"), ("limit=x", "limit"), ("since=yesterday", "since"),
    ("after=zzz", "after"), ("state=waiting&after=zzz", "after"), ("state=suspect&after=zzz", "after"),
    ("state=dead&after=zzz", "after"), ("after=n1:zzz", "after"), ("local=2", "local"),
])  # fmt: skip
def test_a_bad_search_is_named(node: FakeNode, query: str, field: str) -> None:
    async def test(call: Caller) -> None:
        answer = await call.get(f"/v1/tasks?{query}")
        assert (answer.status, answer.body["field"]) == (400, field)

    run(node, test)
