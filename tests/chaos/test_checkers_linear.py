"""Linearizability: what has an order is accepted, what has none is not; the search agrees with a naive one."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from itertools import permutations

import pytest

from chaos import history as h
from chaos.checkers.linear import (
    FRESH,
    NEVER,
    Id,
    Timed,
    claim_step,
    claims_and_settles_are_linearizable,
    linearizable,
    settle_step,
)
from chaos.history import History
from raft.commands import Outcome, Result


def write(value: int) -> Callable[[int], Iterable[int]]:
    return lambda _: [value]


def read(value: int) -> Callable[[int], Iterable[int]]:
    return lambda state: [state] if state == value else []


def naive(operations: list[Timed[int]]) -> bool:
    """Every subset that holds all that must have happened, in every order."""
    for order in permutations(range(len(operations))):
        for count in range(len(order) + 1):
            chosen = order[:count]
            left = [operations[at] for at in range(len(operations)) if at not in chosen]
            if any(each.returned != NEVER for each in left):
                continue
            if _fits([operations[at] for at in chosen]):
                return True
    return False


def _fits(order: list[Timed[int]]) -> bool:
    for at, each in enumerate(order):
        if any(later.returned < each.called for later in order[at + 1 :]):
            return False
    states = {0}
    for each in order:
        states = {after for state in states for after in each.step(state)}
    return bool(states)


def test_the_search_agrees_with_every_order_tried_on_random_registers() -> None:
    draw = random.Random(4)
    verdicts = []
    for _ in range(400):
        operations = []
        for _ in range(draw.randrange(1, 6)):
            called = draw.randrange(10)
            returned = NEVER if draw.random() < 0.15 else called + draw.randrange(1, 6)
            step = (write if draw.random() < 0.5 else read)(draw.randrange(3))
            operations.append(Timed(called, returned, step))
        found = not linearizable(operations, 0)
        assert found == naive(operations)
        verdicts.append(found)
    assert 50 < sum(verdicts) < 350  # both are seen


def test_a_read_of_what_was_overwritten_before_it_began_has_no_order() -> None:
    operations = [Timed(1, 2, write(1)), Timed(3, 4, write(2)), Timed(5, 6, read(1), "the read")]
    assert linearizable(operations, 0) == ["the read"]


def test_a_read_that_overlaps_a_write_may_see_either() -> None:
    for seen in (0, 1):
        assert linearizable([Timed(1, 5, write(1)), Timed(2, 3, read(seen))], 0) == []


def test_a_write_whose_answer_was_lost_may_have_happened_or_not() -> None:
    for seen in (0, 1):
        assert linearizable([Timed(1, NEVER, write(1)), Timed(2, 3, read(seen))], 0) == []


def test_many_concurrent_operations_are_ordered_without_trying_all_orders() -> None:
    # 24 factorial orders; the memo knows each set of writes done, with the last of them, once.
    operations: list[Timed[int]] = [Timed(0, 100, write(number % 3)) for number in range(12)]
    operations += [Timed(0, 100, read(7)), Timed(101, 102, read(2))]
    assert linearizable(operations, 0) != []
    del operations[12]
    assert linearizable(operations, 0) == []


def claim(session: int, called: int, outcome: Outcome, fence: int = 0) -> Timed[Id]:
    return Timed(called, called + 1, claim_step(session, outcome, fence), f"claim of {session}")


def settle(session: int, called: int, outcome: Outcome, fence: int) -> Timed[Id]:
    return Timed(
        called, called + 1, settle_step(session, fence, Result.DONE, outcome), f"settle of {session}"
    )


@pytest.mark.parametrize(
    "operations",
    [
        [claim(1, 1, Outcome.GRANTED, 5), settle(1, 3, Outcome.SETTLED, 5), claim(2, 5, Outcome.EXECUTED)],
        [claim(1, 1, Outcome.GRANTED, 5), claim(1, 3, Outcome.GRANTED, 5), claim(2, 3, Outcome.HELD)],
        [claim(1, 1, Outcome.GRANTED, 5), settle(1, 3, Outcome.SETTLED, 5), settle(1, 5, Outcome.SETTLED, 5)],
        [claim(1, 1, Outcome.GRANTED, 5), settle(2, 3, Outcome.FENCED, 4), settle(2, 4, Outcome.LAPSED, 5)],
    ],
)
def test_what_the_ledger_may_answer_has_an_order(operations: list[Timed[Id]]) -> None:
    assert linearizable(operations, FRESH) == []


@pytest.mark.parametrize(
    "operations",
    [
        [claim(1, 1, Outcome.GRANTED, 5), claim(2, 3, Outcome.GRANTED, 6)],
        [claim(1, 1, Outcome.GRANTED, 5), settle(1, 3, Outcome.SETTLED, 4)],
        [claim(1, 1, Outcome.GRANTED, 5), settle(1, 3, Outcome.FENCED, 5)],
        [claim(1, 1, Outcome.EXECUTED)],
        [claim(1, 1, Outcome.GRANTED, 5), settle(1, 3, Outcome.SETTLED, 5), claim(2, 5, Outcome.GRANTED, 6)],
        [claim(2, 1, Outcome.HELD), claim(1, 3, Outcome.GRANTED, 5)],
    ],
)
def test_what_the_ledger_must_not_answer_has_none(operations: list[Timed[Id]]) -> None:
    assert linearizable(operations, FRESH) != []


def test_a_lapse_that_nobody_asked_for_explains_a_second_grant() -> None:
    history = History()
    grants = ((1, "n1/1", 5, 1), (2, "n2/1", 9, 10))
    history.operations = [
        h.Operation(who, 1, "CLAIM", 7, session, at, at + 1, fence, None, Outcome.GRANTED)
        for session, who, fence, at in grants
    ]
    assert len(claims_and_settles_are_linearizable(history)) == 1
    history.decisions = [
        h.Suspected(8, 7, 5, "n1", 1, "lapsed", 4),
        h.Ruled(8, 7, 5, h.Verdict.NOT_EXECUTED, "policy:rerun", 6),
    ]
    assert claims_and_settles_are_linearizable(history) == []
