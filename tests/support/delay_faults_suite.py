"""What befalls delayed tasks on real nodes, as tests that a module takes by ``from … import *``, for both logs.

It gives them the fixture ``stage`` (tests/support/delay_stage.py): three nodes that take work. Each test ends by
judging the whole history, and leaves the stage as it found it.
"""

from __future__ import annotations

import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dedup.ids import parse_id
from tests.support.delay_stage import DUE_TASKS, FAR_MS, HOUR_MS, LONG, Stage, wall_ms
from tests.support.real_cluster import eventually
from tests.support.watched_schedule import Watched

ROLES = ("leader", "follower") if LONG else ("leader",)

# --- wall clocks ----------------------------------------------------------------------------------------------


def test_a_clock_that_jumps_an_hour_ahead_starts_its_own_nodes_tasks_and_jumping_back_hangs_nothing(
    stage: Stage,
) -> None:
    due_ms = wall_ms() + FAR_MS
    far = [*stage.submit(240, due_ms), *stage.submit(60, due_ms, "enqueue")]
    stage.wait_kept(len(far))
    kept = stage.kept_of()
    ahead = max(kept, key=lambda node: kept[node])
    stage.bend({ahead: HOUR_MS})
    eventually(f"all of {ahead} have begun", lambda: stage.count(far) >= kept[ahead])
    assert stage.count(far) == kept[ahead], "a task began by a clock that was not its owner's"
    # Its wheel's time is an hour ahead now, and stays there.
    stage.bend({ahead: 0})
    soon = [*stage.submit(120, wall_ms() + 2_500), *stage.submit(60, wall_ms() + 500)]
    stage.wait_started(soon)
    assert stage.count(far) == kept[ahead]
    stage.bend_all(HOUR_MS)
    stage.wait_started(far)
    stage.bend_all(0)
    later = [*stage.submit(120, wall_ms() + 2_500), *stage.submit(60, wall_ms() + 500)]
    stage.wait_started(later)
    stage.check()


def test_clocks_that_are_set_back_an_hour_make_late_and_never_early_and_go_by_the_new_time(
    stage: Stage,
) -> None:
    pending = stage.submit(90, wall_ms() + FAR_MS)
    stage.wait_kept(90)
    stage.bend_all(-HOUR_MS)
    by_new_time = [
        each
        for number, node in enumerate(stage.cluster.nodes)
        for each in stage.submit_to(node, 30, stage.clock_ms(node) + (2_500 if number else 500))
    ]
    stage.wait_started(by_new_time)
    assert stage.count(pending) == 0
    stage.bend_all(FAR_MS)
    stage.wait_started(pending)
    stage.check()


def test_strobing_clocks_start_nothing_early_and_nothing_twice(stage: Stage) -> None:
    nodes = stage.cluster.nodes
    watched = Watched(stage.cluster, "strobed", "latest", 4_000, handler="real.stamp", ahead_ms=HOUR_MS)
    chosen = random.Random(6)
    begin = wall_ms()
    some = [each for number in range(12) for each in stage.submit(20, begin + 2_500 + 300 * number)]
    far = stage.submit(60, begin + FAR_MS)
    while wall_ms() < begin + 7_000:
        stage.bend({node: chosen.choice((-1, 0, 1)) * HOUR_MS for node in nodes})
        time.sleep(chosen.choice((0.05, 0.1, 1.2)))  # the strobe's own pace; now and then a node looks at it
    stage.bend_all(0)
    stage.wait_started(some)
    stage.bend_all(HOUR_MS)
    stage.wait_started(far)
    watched.wait_for(1)
    shown, effects = watched.end(), watched.effects()
    stage.bend_all(0)
    assert set(effects.values()) == {1}
    owed = range(watched.first_ms, max(effects) + 1, watched.every_ms)
    assert shown["fired"] == len(effects)
    assert len(effects) + shown["missed"] == len(owed), "a time was neither fired nor counted as missed"
    early = stage.early_firings(watched)
    assert not early, early[:10]
    # Its last time is an hour ahead. Deleted and put again, it goes by the clock as it is.
    watched.delete()
    watched.put()
    since_ms = wall_ms()
    eventually("it fires by the true clock", lambda: watched.fired_between(since_ms, wall_ms()))
    watched.end()
    assert set(watched.effects().values()) == {1}
    watched.delete()
    watched.tell_history()
    stage.check()


# --- the owner of what falls due is cut off ---------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_what_falls_due_while_its_owner_is_cut_off_is_run_by_the_others_and_once(
    stage: Stage, role: str
) -> None:
    nodes = stage.cluster.nodes
    due_ms = wall_ms() + FAR_MS
    ids = stage.submit(DUE_TASKS, due_ms)
    stage.wait_kept(DUE_TASKS)
    leader, kept = stage.cluster.leader(), stage.kept_of()
    cut = leader if role == "leader" else max((n for n in nodes if n != leader), key=lambda n: kept[n])
    assert kept[cut] > 0
    fault = stage.cut_off(cut)
    fault.strike()
    try:
        stage.fall_due(due_ms, in_ms=500)
        stage.wait_started(ids)
        found = {stage.node_of(each) for stamps in stage.started(ids).values() for each in stamps}
        assert found == set(nodes) - {cut}, f"{cut} had no majority to claim anything"
        # What it is asked to store it stores for the others, or it says that it cannot.
        answer = stage.post(cut, "/v1/tasks", {"handler": "real.stamp", "body": {"name": "from afar"}})
        assert answer.status_code in (200, 503), answer.text
        stage.cluster.acknowledged([parse_id(each) for each in answer.json().get("ids", ())], "stamp")
    finally:
        fault.heal()
    stage.cluster.wait_up()
    stage.check()
    print(
        f"{cut} cut off, {kept[cut]} of {DUE_TASKS} were its own; latest by {stage.late_ms(ids)[-1]:.0f} ms"
    )


# --- rescheduling ------------------------------------------------------------------------------------------------


def test_a_reschedule_that_races_with_the_due_time_tells_the_truth(stage: Stage) -> None:
    nodes = stage.cluster.nodes
    due_ms = wall_ms() + FAR_MS
    new_ms = due_ms + 10_000
    ids = [stage.submit_one(due_ms) for _ in range(16)]
    stage.wait_kept(16)
    stage.fall_due(due_ms, in_ms=300)
    answers = [stage.reschedule(each, new_ms, nodes[number % 3]) for number, each in enumerate(ids)]
    assert set(answers) <= {200, 409}, answers
    stage.fall_due(new_ms)
    stage.wait_started(ids)
    stage.check()  # what was moved was not early by its new time
    print(f"{answers.count(200)} of {len(ids)} were moved in time")


@pytest.mark.parametrize("role", ROLES)
def test_a_node_that_dies_in_the_midst_of_reschedules_leaves_tasks_that_run_once(
    stage: Stage, role: str
) -> None:
    leader = stage.cluster.leader()
    asked = leader if role == "leader" else next(node for node in stage.cluster.nodes if node != leader)
    other = next(node for node in stage.cluster.nodes if node not in (leader, asked))
    old_ms = wall_ms() + FAR_MS
    new_ms = old_ms - 60_000
    # One a submit, so that they lie in several partitions.
    ids = [stage.submit_one(old_ms) for _ in range(24)]
    stage.wait_kept(24)
    with ThreadPoolExecutor(4) as threads:
        asking = [threads.submit(stage.reschedule, each, new_ms, asked) for each in ids]
        eventually("some were answered", lambda: sum(each.done() for each in asking) >= 6)
        stage.restart(asked)
        answers = [each.result() for each in asking]
    assert None in answers, "it died when all was done"
    unknown = [each for each, answer in zip(ids, answers, strict=True) if answer is None]
    # What nobody asks for again runs by either time, and waits for at most as long as the dead node held it: 20 s.
    left = unknown[1::2] if LONG else []
    for each in unknown:
        assert each in left or stage.reschedule(each, new_ms, other) == 200
    stage.cluster.wait_up()
    stage.fall_due(new_ms)
    stage.wait_started([each for each in ids if each not in left])
    stage.fall_due(old_ms)
    stage.wait_started(ids)
    stage.check()
    print(f"{answers.count(200)} were moved before {asked} died")


def test_the_owner_is_stopped_while_its_tasks_are_moved_and_goes_by_their_new_time_when_it_goes_on(
    stage: Stage,
) -> None:
    old_ms = wall_ms() + FAR_MS
    new_ms = old_ms + 60_000
    ids = [stage.submit_one(old_ms) for _ in range(12)]
    stage.wait_kept(12)
    # So near that they are in the wheel of their owner.
    stage.fall_due(old_ms, in_ms=30_000)
    kept = stage.kept_of()
    owner = max(kept, key=lambda node: kept[node])
    asked = next(node for node in kept if node != owner)
    stage.cluster.pause(owner)
    try:
        # It says nothing: its lease must end first.
        answers = [stage.reschedule(each, new_ms, asked) for each in ids]
        assert set(answers) == {200}, answers
        stage.fall_due(old_ms)
    finally:
        stage.cluster.signal(owner, signal.SIGCONT)
    stage.cluster.wait_up()
    stage.fall_due(new_ms)
    stage.wait_started(ids)
    stage.check()
