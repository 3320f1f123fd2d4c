"""The timing wheel against a heap: whatever is inserted, cancelled, moved, and whatever the clock does.

The model is a dictionary that is sorted each time. The planted bugs at the end show that the comparison sees.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node import wheel as wheels
from node.wheel import DUE_MS_MAX, Wheel

START_MS = 1_800_000_000_000
HOUR_MS = 3_600_000


class Naive:
    """What a wheel promises, the slow way."""

    def __init__(self) -> None:
        self.items: dict[int, tuple[int, int]] = {}
        self.turn = 0

    def insert(self, due_ms: int, item: int) -> None:
        self.turn += 1
        self.items[item] = (due_ms, self.turn)

    def cancel(self, item: int) -> bool:
        return self.items.pop(item, None) is not None

    def advance(self, now_ms: int) -> list[int]:
        fired = sorted((due, turn, item) for item, (due, turn) in self.items.items() if due <= now_ms)
        for _, _, item in fired:
            del self.items[item]
        return [item for _, _, item in fired]

    def first_ms(self) -> int | None:
        return min((due for due, _ in self.items.values()), default=None)


def agree(wheel: Wheel[int], naive: Naive) -> None:
    assert len(wheel) == len(naive.items)
    first, shown = naive.first_ms(), wheel.next_due_ms()
    if first is None or shown is None:
        assert first is shown is None
    else:
        assert shown <= first, "a look that comes too late"


DELAYS = st.one_of(
    st.integers(-5_000, 5_000),
    st.integers(-70_000, 70_000),
    st.integers(-2 * HOUR_MS, 2 * HOUR_MS),
    st.integers(0, 366 * 24 * HOUR_MS),
    st.sampled_from([0, 1, 63, 64, 65, 4095, 4096, 4097, 262_143, 262_144]),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), DELAYS, st.integers(0, 30)),
        st.tuples(st.just("cancel"), st.just(0), st.integers(0, 30)),
        st.tuples(st.just("clock"), DELAYS, st.just(0)),
    ),
    max_size=120,
)


def play(steps: list[tuple[str, int, int]], start_ms: int = START_MS) -> None:
    wheel, naive = Wheel[int](start_ms), Naive()
    now_ms = start_ms
    for what, number, item in steps:
        if what == "insert":
            due_ms = max(0, now_ms + number)
            wheel.insert(due_ms, item)
            naive.insert(due_ms, item)
            assert wheel.due_ms(item) == due_ms
        elif what == "cancel":
            assert wheel.cancel(item) == naive.cancel(item)
            assert item not in wheel
        else:
            now_ms = max(0, now_ms + number)
            # Of one millisecond, what the clock's jumps have set aside may come in another order.
            fired, expected = wheel.advance(now_ms), naive.advance(now_ms)
            assert sorted(fired) == sorted(expected)
        agree(wheel, naive)
    # A reader who follows next_due_ms sees everything in the end, and each look brings it nearer.
    for _ in range(20 * (len(naive.items) + 1)):
        shown = wheel.next_due_ms()
        if shown is None:
            break
        now_ms = max(now_ms, shown)
        assert sorted(wheel.advance(now_ms)) == sorted(naive.advance(now_ms))
    assert len(wheel) == 0


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_it_fires_what_a_heap_would_fire_whatever_the_clock_does(steps: list[tuple[str, int, int]]) -> None:
    play(steps)


@settings(max_examples=100, deadline=None)
@given(STEPS, st.integers(0, 5_000))
def test_it_does_so_from_any_time_on(steps: list[tuple[str, int, int]], start_ms: int) -> None:
    play(steps, start_ms)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(DELAYS.filter(lambda d: d > 0), st.booleans()), max_size=200),
    st.lists(st.integers(0, HOUR_MS), max_size=20),
)
def test_what_is_due_comes_in_due_order_and_in_the_order_of_insertion_within_a_millisecond(
    timers: list[tuple[int, bool]], moves: list[int]
) -> None:
    wheel, naive = Wheel[int](START_MS), Naive()
    for item, (delay_ms, cancelled) in enumerate(timers):
        wheel.insert(START_MS + delay_ms, item)
        naive.insert(START_MS + delay_ms, item)
        if cancelled:
            wheel.cancel(item)
            naive.cancel(item)
    now_ms = START_MS
    for move in [*moves, 400 * 24 * HOUR_MS]:
        now_ms += move
        assert wheel.advance(now_ms) == naive.advance(now_ms)


def test_a_hundred_thousand_timers_fire_as_a_heap_says() -> None:
    draw = random.Random(7)
    wheel, naive = Wheel[int](START_MS), Naive()
    timers = [(START_MS + draw.randrange(60_000), item) for item in range(100_000)]
    wheel.insert_all(timers)
    for due_ms, item in timers:
        naive.insert(due_ms, item)
    gone = draw.sample(range(100_000), 10_000)
    assert all(wheel.cancel(item) and naive.cancel(item) for item in gone)
    now_ms = START_MS
    while naive.items:
        now_ms += draw.randrange(10_000)
        fired = wheel.advance(now_ms)
        assert fired == naive.advance(now_ms)
    assert wheel.next_due_ms() is None


def test_a_jump_of_an_hour_over_empty_time_looks_at_no_slot_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = Wheel[str](START_MS)
    wheel.insert(START_MS + HOUR_MS, "far")
    looks = 0
    real = Wheel._first_slot

    def counted(self: Wheel[str]) -> tuple[int, int, int] | None:
        nonlocal looks
        looks += 1
        return real(self)

    monkeypatch.setattr(Wheel, "_first_slot", counted)
    assert wheel.advance(START_MS + HOUR_MS - 1) == []
    assert wheel.advance(START_MS + HOUR_MS) == ["far"]
    assert looks <= 2 * 8 + 2


def test_a_clock_that_is_set_back_makes_nothing_early_and_nothing_lost() -> None:
    wheel = Wheel[str](START_MS)
    wheel.insert(START_MS + 100, "before the jump")
    assert wheel.advance(START_MS + 50) == []
    back = START_MS - HOUR_MS
    assert wheel.advance(back) == []
    wheel.insert(back + 10, "by the new clock")
    assert wheel.next_due_ms() == back + 10
    assert wheel.advance(back + 9) == []
    assert wheel.advance(back + 10) == ["by the new clock"]
    assert wheel.advance(START_MS + 99) == []
    assert wheel.advance(START_MS + 100) == ["before the jump"]


def test_a_clock_that_strobes_by_an_hour_makes_nothing_early() -> None:
    wheel, draw = Wheel[int](START_MS), random.Random(3)
    due = {}
    for item in range(2_000):
        now_ms = START_MS + item + (HOUR_MS if item % 2 else 0)
        for fired in wheel.advance(now_ms):
            assert due.pop(fired) <= now_ms
        due[item] = now_ms + draw.randrange(1, 500)
        wheel.insert(due[item], item)
    assert sorted(wheel.advance(START_MS + 3 * HOUR_MS)) == sorted(due)


def test_cancelling_what_a_jump_set_aside_leaves_no_heap_behind() -> None:
    wheel = Wheel[int](START_MS)
    for item in range(10_000):
        wheel.insert(START_MS - 1, item)
        wheel.cancel(item)
    assert len(wheel._behind) <= 65
    assert wheel.next_due_ms() is None


@pytest.mark.parametrize("time_ms", [-1, DUE_MS_MAX + 1])
def test_times_that_it_cannot_hold_are_refused(time_ms: int) -> None:
    wheel = Wheel[int](START_MS)
    with pytest.raises(ValueError, match="must be from 0 to"):
        wheel.insert(time_ms, 1)
    assert len(wheel) == 0


# --- the comparison itself ------------------------------------------------------------------------------------


def _early(self: Wheel[int], level: int, index: int, start_ms: int, fired: list[int]) -> None:
    """Fires a whole slot of a higher level when it begins."""
    slot = self._slots[index] or {}
    self._vacate(level, index)
    self._at = start_ms
    for item in slot:
        del self._due[item]
    fired.extend(slot)


def _forgets_the_heap(self: Wheel[int], due_ms: int, item: int) -> None:
    """Takes what is behind the wheel's time for due at once."""
    _PLACE(self, max(due_ms, self._at + 1), item)


_PLACE = Wheel._place


@pytest.mark.parametrize(("name", "bug"), [("_empty", _early), ("_place", _forgets_the_heap)])
def test_a_planted_bug_is_seen(name: str, bug: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels.Wheel, name, bug)
    steps = [("insert", 100, 1), ("clock", 65, 0), ("clock", -HOUR_MS, 0), ("insert", 10, 2), ("clock", 5, 0)]
    with pytest.raises((AssertionError, RuntimeError)):
        play([*steps, ("clock", HOUR_MS, 0)])
