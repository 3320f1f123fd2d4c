"""Each checker sees what it is for: one good history, and for each invariant the same one with one thing wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from chaos import checkers, lines
from chaos import history as h
from chaos.history import History
from raft.commands import Fact, Outcome, Result, Verdict

S = 1_000_000_000


def good() -> History:
    """Task 1 runs on n1; 2 is lost with n1 after its effect, and found by a check; 3 is lost before its start, and
    runs on n2; 4 is cancelled; 5 is delayed; 6 dies."""
    history = History()
    for number in range(1, 7):
        history.submit([number], "check", t_ns=S, due_ns=8 * S if number == 5 else 0)
    history.cancels = [h.CancelTold(4, 2 * S)]
    history.decisions = [
        h.Claimed(10, 1, 10, 1, 101, 2 * S),
        h.Claimed(10, 2, 10, 1, 101, 2 * S),
        h.Claimed(10, 3, 10, 1, 101, 2 * S),
        h.Cancelled(11, 4, 2 * S),
        h.Settled(12, 1, 10, Result.DONE, 4 * S),
        h.Suspected(13, 2, 10, "n1", 1, "lapsed", 6 * S),
        h.Suspected(13, 3, 10, "n1", 1, "lapsed", 6 * S),
        h.Testified(14, 2, 10, "n1", Fact.STARTED, 6 * S + 1),
        h.Testified(14, 3, 10, "n1", Fact.NEVER_STARTED, 6 * S + 1),
        h.Ruled(14, 3, 10, Verdict.NOT_EXECUTED, "testimony", 6 * S + 1),
        h.Ruled(15, 2, 10, Verdict.EXECUTED, "check", 6 * S + 2),
        h.Claimed(16, 3, 16, 1, 102, 7 * S),
        h.Claimed(17, 6, 17, 1, 102, 7 * S),
        h.Settled(18, 3, 16, Result.DONE, 8 * S),
        h.Settled(18, 6, 17, Result.DEAD, 8 * S),
        h.Claimed(19, 5, 19, 1, 102, 8 * S),
        h.Settled(20, 5, 19, Result.DONE, 9 * S),
    ]
    for number, fence, at_ns in ((1, 10, 3 * S), (2, 10, 5 * S), (3, 16, 7 * S + 2), (5, 19, 8 * S + 2)):
        history.starts.append(h.Started(number, fence, 1, at_ns))
        history.effects.append(h.Effect(number, fence, 1, at_ns + 1))
    granted, settled = Outcome.GRANTED, Outcome.SETTLED
    history.operations = [
        *(h.Operation("n1/1", 1, "CLAIM", n, 101, 2 * S - 9, 2 * S, 10, None, granted) for n in (1, 2, 3)),
        h.Operation("n1/1", 2, "SETTLE", 1, 101, 4 * S - 9, 4 * S, 10, Result.DONE, settled),
        h.Operation("n1/1", 3, "SETTLE", 2, 101, 5 * S + 9, 0, 10, Result.DONE, None),
        h.Operation("n2/2", 1, "CLAIM", 1, 102, 5 * S, 5 * S + 1, 0, None, Outcome.EXECUTED),
        h.Operation("n2/2", 2, "CLAIM", 3, 102, 7 * S - 9, 7 * S, 16, None, granted),
        h.Operation("n2/2", 3, "SETTLE", 3, 102, 8 * S - 9, 8 * S, 16, Result.DONE, settled),
    ]
    history.leases = [h.Lease(S, "n1/1", 101, 6 * S), h.Lease(6 * S, "n2/2", 102, 12 * S)]
    history.placed = [h.Placed(0, number - 1, number) for number in range(1, 7)]
    history.positions = [h.Position(0, 1, 4 * S), h.Position(0, 6, 9 * S)]
    history.digests = [h.Digest("n1", 20, "aa"), h.Digest("n2", 20, "aa"), h.Digest("n1", 19, "bb")]
    history.counted = h.Counted(executed=4, dead=1, cancelled=1, suspect=0)
    history.kept = h.Kept(100, 50, 20, 20)
    history.faults = [h.Fault(5 * S, "FAULT", "killed", ("n1",)), h.Fault(6 * S, "HEAL", "killed", ("n1",))]
    history.leaders = [h.Led(S, "n1", 3), h.Led(6 * S, "n2", 4)]
    history.memory = [h.Memory(9 * S, "n1", 100)]
    history.promises = [h.Promise(6 * S, 5 * S, 2, 1000)]
    return history


def wrong(history: History) -> dict[int, int]:
    """How many sentences each violated invariant has."""
    return {found.invariant.number: len(found.wrong) for found in checkers.judge(history) if found.wrong}


def test_a_right_history_is_found_right() -> None:
    assert wrong(good()) == {}


def test_an_empty_history_is_found_right() -> None:
    assert wrong(History()) == {}


def drop_last(history: History, task: int) -> None:
    last = max(at for at, each in enumerate(history.decisions) if each.id == task)
    del history.decisions[last]


def acknowledged_and_never_ended(history: History) -> None:
    history.submit([7], "check")
    history.placed.append(h.Placed(0, 6, 7))


def effect_of_a_stranger(history: History) -> None:
    del history.submitted[6]
    history.effects.append(h.Effect(6, 17, 1, 7 * S + 3))


def effect_twice(history: History) -> None:
    history.effects.append(h.Effect(3, 10, 1, 3 * S))


def effect_lost(history: History) -> None:
    del history.effects[0]


def fence_goes_back(history: History) -> None:
    history.decisions[11] = h.Claimed(16, 3, 9, 1, 102, 7 * S)
    history.operations[-2:] = []
    history.starts[2] = h.Started(3, 9, 1, 7 * S + 2)
    history.effects[2] = h.Effect(3, 9, 1, 7 * S + 2)
    history.decisions[13] = h.Settled(18, 3, 9, Result.DONE, 8 * S)


def claimed_while_held(history: History) -> None:
    history.operations.append(
        h.Operation("n2/2", 9, "CLAIM", 1, 102, 3 * S, 3 * S + 1, 0, None, Outcome.EXECUTED)
    )


def started_without_a_claim(history: History) -> None:
    history.effects[0] = h.Effect(1, 11, 1, 3 * S)


def started_before_the_claim_was_answered(history: History) -> None:
    history.starts[0] = h.Started(1, 10, 1, 2 * S - 1)


def started_after_the_lease(history: History) -> None:
    history.leases[0] = h.Lease(S, "n1/1", 101, 4 * S)


def a_zombie_acts(history: History) -> None:
    history.effects[1] = h.Effect(2, 10, 1, 6 * S + 5)


def an_old_fence_settles(history: History) -> None:
    history.decisions.insert(12, h.Settled(17, 3, 10, Result.DONE, 7 * S))


def position_passes_something_open(history: History) -> None:
    history.positions = [h.Position(0, 7, 9 * S)]
    history.placed.append(h.Placed(0, 6, 7))


def position_goes_back(history: History) -> None:
    history.positions.insert(1, h.Position(0, 7, 5 * S))


def executed_ids_are_forgotten_too_soon(history: History) -> None:
    history.kept = h.Kept(89, 50, 20, 20)


def testified_twice(history: History) -> None:
    history.decisions.insert(9, h.Testified(14, 3, 10, "n1", Fact.FAILED))


def testimony_lies(history: History) -> None:
    history.starts.append(h.Started(3, 10, 1, 3 * S))


def a_suspect_is_left(history: History) -> None:
    del history.decisions[10]
    history.counted = h.Counted(executed=3, dead=1, cancelled=1, suspect=1)
    del history.submitted[2]
    history.submit([2], "rerun", acknowledged=False)
    history.placed = []


def replicas_differ(history: History) -> None:
    history.digests.append(h.Digest("n3", 19, "cc"))


def two_leaders_of_a_term(history: History) -> None:
    history.leaders.append(h.Led(7 * S, "n3", 4))


def an_acknowledged_settle_is_gone(history: History) -> None:
    history.operations.append(
        h.Operation("n3/3", 1, "SETTLE", 6, 103, 7 * S + 5, 9 * S, 99, Result.DONE, Outcome.SETTLED)
    )


def an_acknowledged_submit_is_gone(history: History) -> None:
    history.submit([7], "check")


def a_cancelled_task_starts(history: History) -> None:
    history.starts.append(h.Started(4, 10, 1, 3 * S))


def a_delayed_task_is_early(history: History) -> None:
    history.submitted[5] = h.Submitted(5, "check", True, S, 9 * S)


def no_progress(history: History) -> None:
    history.promises = [h.Promise(9 * S, S, 1)]


def a_fault_is_left_standing(history: History) -> None:
    del history.faults[1]


def memory_grows(history: History) -> None:
    history.memory.append(h.Memory(9 * S, "n1", 2000))


def counters_lie(history: History) -> None:
    history.counted = h.Counted(executed=5, dead=1, cancelled=1, suspect=0)


PLANTED: dict[Callable[[History], None], set[int]] = {
    acknowledged_and_never_ended: {1},
    effect_of_a_stranger: {1},
    effect_twice: {2, 9},
    effect_lost: {2},
    fence_goes_back: {3, 5},
    claimed_while_held: {3},
    started_without_a_claim: {4},
    started_before_the_claim_was_answered: {4},
    started_after_the_lease: {4},
    a_zombie_acts: {5},
    an_old_fence_settles: {3, 5},
    position_passes_something_open: {6},
    position_goes_back: {7},
    executed_ids_are_forgotten_too_soon: {8},
    testified_twice: {9},
    testimony_lies: {9},
    a_suspect_is_left: {9},
    replicas_differ: {10},
    two_leaders_of_a_term: {10},
    an_acknowledged_settle_is_gone: {3, 11},
    an_acknowledged_submit_is_gone: {1, 11},
    a_cancelled_task_starts: {12},
    a_delayed_task_is_early: {12},
    no_progress: {13},
    a_fault_is_left_standing: {13},
    memory_grows: {13},
    counters_lie: {14},
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda each: each.__name__)
def test_what_is_wrong_is_seen_by_its_invariant_and_by_no_other(plant: Callable[[History], None]) -> None:
    history = good()
    plant(history)
    found = wrong(history)
    assert found.keys() == PLANTED[plant], found


def test_every_invariant_is_violated_by_some_history() -> None:
    assert (
        set().union(*PLANTED.values()) == {each.number for each in checkers.INVARIANTS} == set(range(1, 15))
    )


def test_a_history_that_was_written_down_is_read_back_whole(tmp_path: Path) -> None:
    history = good()
    history.refused = [h.SubmitFailed(3 * S, "nobody answers")]
    history.submit([b"0123456789abcdef"], "rerun", acknowledged=False, t_ns=S)
    history.aside = {b"0123456789abcdef"}
    history.sink_is_exact = False
    path = tmp_path / "history.jsonl"
    lines.write(history, path)
    again = lines.read(path)
    for name, told in vars(history).items():
        found = vars(again)[name]
        if isinstance(told, list):
            assert sorted(map(repr, found)) == sorted(map(repr, told)), name
        else:
            assert found == told, name
    assert again.decisions == history.decisions
    assert again.positions == history.positions


def test_a_history_that_was_read_back_is_judged_alike(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    for plant in PLANTED:
        history = good()
        plant(history)
        lines.write(history, path)
        assert wrong(lines.read(path)) == wrong(history), plant.__name__


def test_a_claim_that_was_asked_for_twice_may_start_after_its_first_answer() -> None:
    history = good()
    again = h.Operation("n1/1", 8, "CLAIM", 1, 101, 2 * S + 1, 3 * S + 9, 10, None, Outcome.GRANTED)
    history.operations.append(again)
    assert wrong(history) == {}


def test_where_the_sink_stands_around_a_handler_an_effect_may_be_untold() -> None:
    history = good()
    effect_lost(history)
    history.sink_is_exact = False
    assert wrong(history) == {}
    del history.starts[0]
    assert wrong(history) == {2: 1}
