"""The story of a task, against golden texts: what a person reads in each situation."""

from __future__ import annotations

from typing import Any

import pytest

from dedup.ids import Ids, ids_of, keyed_id
from node.records_model import Attempt, Ending, EventKind, RecordedEvent
from node.why import Facts, Place, story
from raft.ledger import TaskState

T0 = 1_780_000_000_000  # 2026-05-28 20:26:40 UTC
ONE = Ids(((17, 1),))


def facts(state: str, standing: TaskState, **more: Any) -> Facts:
    fields: dict[str, Any] = {
        "id": 17, "handler": "shop.charge", "queue": "default", "submitted_ms": T0,
        "submitted_by": "web1:812 shop.py", "places": (Place(3, 41, True),), "on_doubt": "check",
    }  # fmt: skip
    return Facts(state=state, standing=standing, **(fields | more))


def attempt(number: int, node: str, fence: int, ending: Ending, **more: Any) -> Attempt:
    fields: dict[str, Any] = {"claimed_ms": T0 + 10, "started_ms": T0 + 12, "ended_ms": T0 + 47}
    return Attempt(
        ids=ONE, queue="default", handler="shop.charge", node=node, fence=fence, attempt=number, ending=ending,
        **(fields | more),
    )  # fmt: skip


def event(index: int, kind: EventKind, **more: Any) -> RecordedEvent:
    return RecordedEvent(index, 0, kind, ONE, T0 + 5000, **more)


SUBMITTED = [
    "Task 17 was submitted to shop.charge in queue default at 2026-05-28 20:26:40.000 UTC by web1:812 shop.py.",
    "It stands in the log: partition 3 at offset 41; the committed position has passed it.",
]
CASES: dict[str, tuple[Facts, list[str]]] = {
    "a plain success": (
        facts("executed", TaskState("executed"), attempts=(attempt(1, "n2", 311, Ending.DONE),)),
        [
            *SUBMITTED,
            "Node n2 claimed it at 2026-05-28 20:26:40.010 UTC with fence 311, for attempt 1.",
            "It started at 2026-05-28 20:26:40.012 UTC and finished, after 35 ms.",
            "It is executed, for good: however often it is delivered, it will not run again.",
        ],
    ),
    "never touched, its queue paused": (
        facts("waiting", TaskState("new", attempt=1), places=(Place(3, 41, False),), queue_paused=True),
        [
            SUBMITTED[0],
            "It stands in the log: partition 3 at offset 41; the committed position has not passed it.",
            "It waits for a node to claim it. Queue default is paused, so nothing of it starts.",
        ],
    ),
    "its node was killed, and the check found the effect": (
        facts(
            "executed",
            TaskState("executed"),
            events=(
                event(400, EventKind.SUSPECTED, fence=311, node="n2", incarnation=4, what="lapsed"),
                event(420, EventKind.TESTIFIED, fence=311, node="n2", what="started", by="n2"),
                event(431, EventKind.RESOLVED, fence=311, what="executed", by="check",
                      reason="the handler's check found its effect"),
            ),
        ),
        [
            *SUBMITTED,
            "Node n2 claimed it with fence 311, and left no record of that attempt.",
            "The claim of node n2 (fence 311) was lost at 2026-05-28 20:26:45.000 UTC: its session"
            " lapsed (the node was"
            " lost, or cut off from the majority). It became a suspect.",
            "Node n2 testified at 2026-05-28 20:26:45.000 UTC about fence 311 from its work"
            " journal: that it had started"
            " there, and not how it ended.",
            "The handler's check settled the doubt at 2026-05-28 20:26:45.000 UTC: it counts as"
            " executed (the handler's"
            " check found its effect).",
            "It is executed, for good: however often it is delivered, it will not run again.",
        ],
    ),
    "a worker was lost, and nobody knows how long its task had run": (
        facts(
            "suspect",
            TaskState("suspect", 311, 5, "n2", 4, 1, why="doubt", testified=(4,)),
            attempts=(attempt(1, "n2", 311, Ending.DOUBT, error="the worker died of SIGKILL", started_ms=0),),
            on_doubt="check",
        ),
        [
            *SUBMITTED,
            "Node n2 claimed it at 2026-05-28 20:26:40.010 UTC with fence 311, for attempt 1.",
            "When it started is not recorded; it was lost at 2026-05-28 20:26:40.047 UTC: the worker died of"
            " SIGKILL. Whether it took effect was in doubt.",
            "It is a suspect: node n2 has testified that it had started, and the handler's check decides next."
            " Until then it neither runs nor counts as done.",
        ],
    ),
    "a worker was lost, a human is asked": (
        facts(
            "suspect",
            TaskState("suspect", 311, 5, "n2", 4, 1, why="doubt", testified=(4,), held_by="policy:hold",
                      held_reason="the check could not tell"),
            attempts=(attempt(1, "n2", 311, Ending.DOUBT, error="the worker process died (signal 9)"),),
            events=(
                event(400, EventKind.SUSPECTED, fence=311, node="n2", what="doubt"),
                event(431, EventKind.RESOLVED, fence=311, what="held", by="policy:hold",
                      reason="the check could not tell"),
            ),
            aside="suspect",
        ),
        [
            *SUBMITTED,
            "Node n2 claimed it at 2026-05-28 20:26:40.010 UTC with fence 311, for attempt 1.",
            "It started at 2026-05-28 20:26:40.012 UTC and was lost, after 35 ms: the worker"
            " process died (signal 9)."
            " Whether it took effect was in doubt.",
            "The claim of node n2 (fence 311) was lost at 2026-05-28 20:26:45.000 UTC: its worker"
            " process died, or was"
            " killed, in the middle of the task. It became a suspect.",
            "The handler's policy on doubt, hold, left it for a human to decide at 2026-05-28"
            " 20:26:45.000 UTC (the check"
            " could not tell).",
            "It is a suspect, held for a human (the check could not tell): it waits for `oncekeeper"
            " suspect rule 17`.",
        ],
    ),
    "failed, retried, dead": (
        facts(
            "dead",
            TaskState("dead", 350, attempt=2),
            attempts=(
                attempt(1, "n1", 311, Ending.RETRY, error="ValueError: no such account\nmore"),
                attempt(2, "n3", 350, Ending.DEAD, error="ValueError: no such account."),
            ),
            aside="dead",
            aside_reason="2 attempts failed",
        ),
        [
            *SUBMITTED,
            "Node n1 claimed it at 2026-05-28 20:26:40.010 UTC with fence 311, for attempt 1.",
            "It started at 2026-05-28 20:26:40.012 UTC and failed, after 35 ms: ValueError: no such"
            " account. Another"
            " attempt was allowed.",
            "Node n3 claimed it at 2026-05-28 20:26:40.010 UTC with fence 350, for attempt 2.",
            "It started at 2026-05-28 20:26:40.012 UTC and failed for good, after 35 ms:"
            " ValueError: no such account. It"
            " became a dead letter.",
            "It is a dead letter (2 attempts failed) after attempt 2: only a manual retry runs it again.",
        ],
    ),
    "waits for its next attempt": (
        facts(
            "delayed", TaskState("waiting", 311, attempt=2, why="retry"), due_in_ms=90_500,
            attempts=(attempt(1, "n1", 311, Ending.RETRY, error=""),), places=(Place(3, 41, False),),
        ),
        [
            SUBMITTED[0],
            "It stands in the log: partition 3 at offset 41; the committed position has not passed it.",
            "Node n1 claimed it at 2026-05-28 20:26:40.010 UTC with fence 311, for attempt 1.",
            "It started at 2026-05-28 20:26:40.012 UTC and failed, after 35 ms: no reason was"
            " recorded. Another attempt"
            " was allowed.",
            "The last attempt failed. It waits for attempt 2, due in 90.5 s.",
        ],
    ),
    "revived by hand, on its way back into the log, a node missing": (
        facts(
            "waiting", TaskState("waiting", 311, attempt=1, why="revived"), aside="dead",
            events=(event(500, EventKind.REVIVED, by="human:ana"),), unreachable=("n2", "n3"), stale=True,
        ),
        [
            *SUBMITTED,
            "It was allowed to run again at 2026-05-28 20:26:45.000 UTC by ana, from attempt 1.",
            "It was brought back by hand. It is being put back into the log, to be claimed from there.",
            "No answer came from n2 and n3, so what only n2 and n3 knew is missing here.",
            "The ledger had no quorum to ask; this is what the node that answered knew last.",
        ],
    ),
    "submitted twice under a key, running": (
        facts(
            "running", TaskState("claimed", 311, 5, "n2", 4, 1), id=keyed_id("default", "a"), key="a",
            places=(Place(0, 5, False), Place(1, 9, False)), submitted_by="",
        ),
        [
            "Task kID was submitted to shop.charge in queue default, under the key 'a', at"
            " 2026-05-28 20:26:40.000 UTC.",
            "It stands in the log twice, which one claim makes harmless: partition 0 at offset 5"
            " and partition 1 at"
            " offset 9; the committed position has not passed all of them.",
            "It is running now, or about to: node n2 holds it with fence 311, attempt 1.",
        ],
    ),
    "only history is left": (
        facts("executed", TaskState("executed"), handler="", queue="", submitted_ms=0, places=(),
              attempts=(attempt(1, "n2", 311, Ending.LAPSED, started_ms=0),)),
        [
            "Task 17 is a task of shop.charge in queue default; its message is no longer kept.",
            "Node n2 claimed it at 2026-05-28 20:26:40.010 UTC with fence 311, for attempt 1.",
            "When it started is not recorded; it ended, but the node's session had lapsed: what it"
            " said is testimony.",
            "It is executed, for good: however often it is delivered, it will not run again.",
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_story_reads_as_a_person_would_tell_it(name: str) -> None:
    given, expected = CASES[name]
    key = keyed_id("default", "a").hex()
    assert [sentence.replace(key, "ID") for sentence in story(given)] == expected


def test_attempts_and_decisions_are_told_in_the_order_of_the_ledger() -> None:
    given = facts(
        "executed",
        TaskState("executed"),
        attempts=(attempt(2, "n3", 450, Ending.DONE), attempt(1, "n2", 311, Ending.DOUBT)),
        events=(
            event(440, EventKind.RESOLVED, fence=311, what="not executed", by="policy:rerun"),
            event(400, EventKind.SUSPECTED, fence=311, node="n2", what="doubt"),
        ),
    )
    told = " ".join(story(given))
    places = [
        told.index(text)
        for text in ("fence 311, for attempt 1", "became a suspect", "may run again", "fence 450")
    ]
    assert places == sorted(places)


@pytest.mark.parametrize("kind", EventKind)
@pytest.mark.parametrize("ending", Ending)
def test_every_event_and_ending_has_its_words(kind: EventKind, ending: Ending) -> None:
    given = facts(
        "waiting",
        TaskState("new"),
        attempts=(attempt(1, "n1", 5, ending),),
        events=(event(9, kind, node="n1", what="so"),),
    )
    told = story(given)
    assert len(told) >= 5
    assert all(sentence[0].isupper() and sentence[-1] == "." and "  " not in sentence for sentence in told)
    assert ids_of([17]) == ONE
