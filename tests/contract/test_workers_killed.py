"""Nodes and workers that are killed or paused: what still runs then, and what the journal says afterwards.

Effects are recorded outside of the system, in a file opened with O_APPEND, and compared with the testimony.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dedup.ids import Ids
from node.workers.journal import BOOT_ID_VARIABLE
from node.workers.testimony import Evidence, read_testimony
from raft.commands import Fact
from tests.support.worker_node import NodeProcess
from tests.support.worker_pool import DEADLINE_S, is_running, lines

Start = Callable[..., NodeProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[NodeProcess] = []

    def begin(**settings: int) -> NodeProcess:
        node = NodeProcess(tmp_path / "work", **{"cpu_workers": 2, **settings})
        started.append(node)
        return node

    yield begin
    for node in started:
        node.signal(signal.SIGCONT)
        node.kill()


def wait(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S} s: {what}"
        time.sleep(0.005)


def ids_with(evidence: Evidence, fact: Fact) -> set[int]:
    return {int(one) for told in evidence.facts if told.fact is fact for one in told.ids}  # type: ignore[arg-type]


def effects_of(path: Path) -> list[int]:
    return [int(line) for line in lines(path)]


def test_after_kill_9_of_the_node_its_journal_agrees_with_the_effects(tmp_path: Path, start: Start) -> None:
    node, effects = start(), tmp_path / "effects"
    node.tell(lease_ms=600_000)
    for number in range(20):
        bodies = [{"path": str(effects), "n": 1 + 100 * number + n} for n in range(100)]
        node.submit(number, "bad.effect", bodies, 1 + 100 * number, fence=1000 + number)
    wait(lambda: len(lines(effects)) > 300, "300 effects")
    node.kill()
    evidence = read_testimony(tmp_path / "work", 1)
    took = effects_of(effects)
    assert len(took) == len(set(took)), "nothing ran twice"
    started, finished = ids_with(evidence, Fact.STARTED), ids_with(evidence, Fact.FINISHED)
    assert evidence.complete
    assert finished <= set(took), "what is testified as finished did take effect"
    assert len(started) <= 2, "one task a worker is in doubt"
    assert set(took) <= finished | started, "whatever took effect is testified as finished or started"
    assert not ids_with(evidence, Fact.NEVER_STARTED) & set(took)
    assert not ids_with(evidence, Fact.FAILED)
    for told in evidence.facts:
        assert all((int(one) - 1) // 100 + 1000 == told.fence for one in told.ids), "each with its own fence"  # type: ignore[arg-type]


def test_however_often_workers_are_killed_each_task_is_told_once_and_truly(
    tmp_path: Path, start: Start
) -> None:
    node, effects = start(), tmp_path / "effects"
    node.tell(lease_ms=600_000)
    dice = random.Random(3)
    for number in range(40):
        bodies = [{"path": str(effects), "n": 100 * number + n, "pause_s": 0.001} for n in range(100)]
        node.submit(number, "bad.effect", bodies, 1 + 100 * number, fence=1 + number)
    for kill in range(1, 9):
        # When some more have come to pass, at no particular moment of any of them.
        wait(lambda: len(lines(effects)) >= 150 * kill, "more effects")  # noqa: B023 - called before it changes
        time.sleep(dice.random() * 0.01)
        node.hear(lambda: len(set(node.workers())) >= 2 + kill, "the replacement is there")  # noqa: B023
        victim = dice.choice([pid for pid in node.workers()[1:] if is_running(pid)])
        os.kill(victim, signal.SIGKILL)
    node.hear(lambda: all(len(node.ends(n)) == 100 for n in range(40)), "all of them ended")
    told: dict[str, set[int]] = {"DONE": set(), "CRASHED": set(), "NOT_STARTED": set()}
    for number in range(40):
        for at, ended in node.ends(number).items():
            told[ended].add(100 * number + at)
    took = effects_of(effects)
    assert len(took) == len(set(took)), "nothing ran twice"
    assert told["DONE"] <= set(took)
    assert set(took) <= told["DONE"] | told["CRASHED"]
    assert len(told["CRASHED"]) <= 8, "a kill costs one task at the most"
    assert sum(map(len, told.values())) == 4000


def test_workers_guard_and_what_they_spawned_die_with_the_node(tmp_path: Path, start: Start) -> None:
    node, child = start(), tmp_path / "child"
    node.tell(lease_ms=600_000)
    node.submit(1, "bad.spawn_child", [{"path": str(child)}], 1, fence=1)
    wait(lambda: lines(child), "the child runs")
    node.kill()
    pids = [*node.workers(), node.guard(), int(lines(child)[0])]
    wait(lambda: not [pid for pid in pids if is_running(pid)], "all of them are gone")


def test_a_released_task_is_forgotten_and_a_doubtful_one_is_not(tmp_path: Path, start: Start) -> None:
    node, effects = start(cpu_workers=1), tmp_path / "effects"
    node.tell(lease_ms=600_000)
    bodies = [{"path": str(effects), "n": n, "die_at": 3} for n in range(1, 6)]
    node.submit(1, "bad.effect", bodies, 1, fence=8)
    node.hear(lambda: len(node.ends(1)) == 5, "all are reported")
    assert list(node.ends(1).values()) == ["DONE", "DONE", "CRASHED", "NOT_STARTED", "NOT_STARTED"]
    node.tell(release=[1, 0, 5])
    node.submit(2, "bad.double", [{"n": 1}], 50, fence=9)
    node.hear(lambda: node.ends(2), "the pools go on")
    node.kill()
    evidence = read_testimony(tmp_path / "work", 1)
    assert evidence.complete
    assert [(told.fence, told.ids, told.fact) for told in evidence.facts] == [
        (8, Ids(((3, 1),)), Fact.STARTED),
        (9, Ids(((50, 1),)), Fact.FINISHED),
    ]


def test_a_handler_that_raised_is_testified_as_failed(tmp_path: Path, start: Start) -> None:
    node = start()
    node.tell(lease_ms=600_000)
    node.submit(1, "bad.odd_raises", [{"n": 1}, {"n": 2}], 1, fence=8)
    node.hear(lambda: len(node.ends(1)) == 2, "both are reported")
    node.kill()
    evidence = read_testimony(tmp_path / "work", 1)
    assert (ids_with(evidence, Fact.FAILED), ids_with(evidence, Fact.FINISHED)) == ({1}, {2})


def test_after_a_power_loss_the_journal_says_nothing(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = start()
    node.tell(lease_ms=600_000)
    node.submit(1, "bad.double", [{"n": 1}], 1, fence=8)
    node.hear(lambda: node.ends(1), "it is reported")
    node.kill()
    monkeypatch.setenv(BOOT_ID_VARIABLE, "after the power loss")
    evidence = read_testimony(tmp_path / "work", 1)
    assert (evidence.complete, evidence.facts) == (False, ())


def test_a_paused_nodes_running_task_is_killed_when_the_lease_runs_out_and_none_starts(
    tmp_path: Path, start: Start
) -> None:
    node, effects = start(cpu_workers=1), tmp_path / "effects"
    node.tell(lease_ms=1500)
    one = {"path": str(effects)}
    node.submit(1, "bad.hold_interpreter_long", [one, one, one], 1, fence=8)
    wait(lambda: lines(effects), "the first one holds the interpreter")
    node.signal(signal.SIGSTOP)
    worker = int(lines(effects)[0])
    wait(lambda: not is_running(worker), "the guard killed it while the node was paused")
    node.signal(signal.SIGCONT)
    node.hear(lambda: len(node.ends(1)) == 3, "all are reported")
    assert list(node.ends(1).values()) == ["CRASHED", "NOT_STARTED", "NOT_STARTED"]
    assert len(lines(effects)) == 1
    node.tell(lease_ms=600_000)
    node.submit(2, "bad.double", [{"n": 1}], 9, fence=9)
    node.hear(lambda: node.ends(2), "with a new lease the node works again")
    assert node.ends(2) == {0: "DONE"}


def test_a_node_and_workers_that_are_paused_together_start_nothing_after_the_lease(
    tmp_path: Path, start: Start
) -> None:
    node, effects = start(cpu_workers=1), tmp_path / "effects"
    node.submit(
        1, "bad.effect", [{"path": str(effects), "n": n, "pause_s": 0.01} for n in range(500)], 1, fence=8
    )
    node.tell(lease_ms=1000)
    wait(lambda: lines(effects), "it runs")
    paused = [*node.workers(), node.guard()]
    node.signal(signal.SIGSTOP)
    for pid in paused:
        os.kill(pid, signal.SIGSTOP)
    lease_over = time.clock_gettime(time.CLOCK_BOOTTIME) + 1.0
    count = len(lines(effects))
    wait(lambda: time.clock_gettime(time.CLOCK_BOOTTIME) > lease_over, "the lease is over")
    # The workers first, the guard last: it is their own look at the lease that must hold them.
    for pid in paused:
        os.kill(pid, signal.SIGCONT)
    node.signal(signal.SIGCONT)
    node.hear(lambda: len(node.ends(1)) == 500, "all are reported")
    assert len(lines(effects)) == count
    assert "NOT_STARTED" in node.ends(1).values()


def test_a_lease_that_is_renewed_lets_a_task_that_holds_the_interpreter_live(
    tmp_path: Path, start: Start
) -> None:
    node, effects = start(cpu_workers=1), tmp_path / "effects"
    node.tell(lease_ms=700)
    node.submit(1, "bad.hold_interpreter_long", [{"path": str(effects)}], 1, fence=8)
    wait(lambda: lines(effects), "it runs")
    end = time.monotonic() + 2.0
    while time.monotonic() < end:
        node.tell(lease_ms=700)
        time.sleep(0.1)
    assert is_running(int(lines(effects)[0]))
    node.tell(lease_ms=600_000)


def test_a_guard_that_died_is_replaced_and_still_guards(tmp_path: Path, start: Start) -> None:
    node, effects = start(cpu_workers=1), tmp_path / "effects"
    node.tell(lease_ms=600_000)
    os.kill(node.guard(), signal.SIGKILL)
    node.hear(lambda: any("GuardRestarted" in one.get("event", "") for one in node.heard), "it was noticed")
    node.submit(1, "bad.hold_interpreter_long", [{"path": str(effects)}], 1, fence=8)
    wait(lambda: lines(effects), "it runs")
    node.tell(lease_ms=500)
    node.hear(lambda: node.ends(1), "the task was killed at the end of the lease")
    assert node.ends(1) == {0: "CRASHED"}
