"""The executed set against a plain set, by random calls; and bugs planted in it, which this catches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import pytest
from bitarray import bitarray
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dedup import keyed, ranges
from dedup.bloom import Hashes
from dedup.executed import ExecutedSet
from dedup.ids import Ids
from dedup.keyed import Generation
from dedup.ranges import CONTAINER_IDS, Container

RETENTION_MS = 1_000
PHASES = (Phase.explicit, Phase.generate)  # a caught bug need not be shrunk


@cache
def key_of(number: int) -> bytes:
    return hashlib.blake2b(str(number).encode(), digest_size=16).digest()


class Step(NamedTuple):
    name: str  # add, retire, restore
    ids: Ids
    passed_ms: int


# Around the borders of containers, where the forms change; and long runs that fill whole containers.
STARTS = st.builds(
    lambda border, offset: max(1, border * CONTAINER_IDS + offset),
    st.integers(0, 3),
    st.integers(-30, 60),
)
COUNTS = st.one_of(
    st.integers(1, 40), st.sampled_from([CONTAINER_IDS - 7, CONTAINER_IDS, 2 * CONTAINER_IDS + 9])
)
SINGLE_RUNS = st.lists(st.tuples(STARTS, COUNTS), max_size=4).map(tuple)
# Many short runs make a bitmap, and the ids between them make it a run list again.
COMBS = st.builds(
    lambda start, teeth, gap: tuple((start + number * gap, 1) for number in range(teeth)),
    STARTS,
    st.integers(5, 30),
    st.integers(2, 3),
)
RUNS = st.one_of(SINGLE_RUNS, COMBS)
KEYS = st.builds(
    lambda start, count, twice: tuple(key_of(n) for n in [*range(start, start + count), *twice]),
    st.integers(0, 2_000),
    st.integers(0, 400),
    st.lists(st.integers(0, 2_400), max_size=5),
)
STEPS = st.lists(
    st.builds(
        Step,
        st.sampled_from(["add", "add", "add", "add", "retire", "restore"]),
        st.builds(Ids, RUNS, KEYS),
        st.integers(0, 150),
    ),
    max_size=14,
)


class Model:
    """What must be so, said plainly: range ids as bits of an int, keys with the generation that took them."""

    def __init__(self) -> None:
        self.bits = 0
        self.generations: list[tuple[int, dict[bytes, int]]] = []  # start, key -> time

    def knows(self, ids: Ids) -> list[tuple[int, bool]]:
        pieces = []
        for start, count in ids.runs:
            text = bin((self.bits >> start) & ((1 << count) - 1) | 1 << count)[:2:-1]
            pieces.append(text)
        known = {key for _, keys in self.generations for key in keys}
        pieces.append("".join("1" if key in known else "0" for key in ids.keys))
        return run_lengths("".join(pieces))

    def add(self, ids: Ids, now_ms: int) -> int:
        before = self.count
        for start, count in ids.runs:
            self.bits |= ((1 << count) - 1) << start
        known = {key for _, keys in self.generations for key in keys}
        new = [key for key in ids.keys if key not in known]
        if new and (not self.generations or now_ms - self.generations[-1][0] >= RETENTION_MS // 4):
            self.generations.append((now_ms, {}))
        for key in new:
            self.generations[-1][1][key] = now_ms
        return self.count - before

    def retire(self, now_ms: int) -> int:
        before = self.count
        self.generations = [g for g in self.generations if now_ms - max(g[1].values()) <= RETENTION_MS]
        return before - self.count

    @property
    def count(self) -> int:
        return self.bits.bit_count() + sum(len(keys) for _, keys in self.generations)


def run_lengths(text: str) -> list[tuple[int, bool]]:
    spans: list[tuple[int, bool]] = []
    at = 0
    while at < len(text):
        end = text.find("0" if text[at] == "1" else "1", at)
        end = len(text) if end < 0 else end
        spans.append((end - at, text[at] == "1"))
        at = end
    return spans


def check(steps: list[Step], error_rate: float = 0.5) -> None:
    """Do ``steps`` and compare every answer. At this error rate false positives are all over the place."""
    executed = ExecutedSet(77, RETENTION_MS, error_rate)
    straight = ExecutedSet(77, RETENTION_MS, error_rate)  # the same calls, but never restored
    model = Model()
    now_ms = 0
    for name, ids, passed_ms in steps:
        now_ms += passed_ms
        assert executed.spans(ids) == model.knows(ids)
        if name == "add":
            new = model.add(ids, now_ms)
            assert executed.add(ids, now_ms) == new
            assert straight.add(ids, now_ms) == new
            assert executed.spans(ids) == ([(len(ids), True)] if len(ids) else [])
        elif name == "retire":
            retired = model.retire(now_ms)
            assert executed.retire(now_ms) == retired
            assert straight.retire(now_ms) == retired
        else:
            executed = ExecutedSet.restore(executed.snapshot())
        for at, new in each(executed.surely_new(ids.keys)):
            assert not (new and ids.keys[at] in straight)
        assert executed.count == model.count
    everything = Ids(((1, 8 * CONTAINER_IDS),), tuple(key_of(n) for n in range(2_500)))
    assert executed.spans(everything) == model.knows(everything)
    assert executed.snapshot() == straight.snapshot()


def each(spans: Sequence[tuple[int, bool]]) -> list[tuple[int, bool]]:
    return list(enumerate(value for count, value in spans for _ in range(count)))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which a few hundred ids see every change of form."""
    monkeypatch.setattr(ranges, "RUNS_MAX", 6)
    monkeypatch.setattr(keyed, "FILTER_KEYS_MIN", 16)
    monkeypatch.setattr(keyed, "_FILL", 4)


def trial(examples: int, *, fixed: bool = False, **more: Any) -> Callable[[], None]:
    @settings(
        deadline=None,
        max_examples=examples,
        derandomize=fixed,
        database=None,
        report_multiple_bugs=False,
        **more,
    )
    @given(STEPS)
    def try_all(steps: list[Step]) -> None:
        check(steps)

    return try_all


def test_the_executed_set_answers_exactly_and_restores_to_equal_bytes() -> None:
    trial(150)()


def test_a_filter_that_errs_always_loses_no_task() -> None:
    @settings(deadline=None, max_examples=30)
    @given(STEPS)
    def try_all(steps: list[Step]) -> None:
        check(steps, error_rate=0.999)

    try_all()


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(STARTS, COUNTS), max_size=12), st.randoms(use_true_random=False))
def test_equal_range_ids_are_equal_bytes_in_whatever_order_they_came(
    runs: list[tuple[int, int]], random: Any
) -> None:
    one, other = ExecutedSet(1), ExecutedSet(1)
    one.add(Ids(tuple(runs)), 0)
    random.shuffle(runs)
    for start, count in runs:
        cut = random.randint(1, count)
        for piece in ((start, cut), (start + cut, count - cut)):
            if piece[1]:
                other.add(Ids((piece,)), 0)
    assert one.snapshot() == other.snapshot()
    assert ExecutedSet.restore(one.snapshot()).snapshot() == one.snapshot()


# --- planted bugs ---------------------------------------------------------------------------------------------


def trust_the_filter(self: Generation, keys: Sequence[bytes], hashes: Hashes) -> bitarray:
    return self.perhaps(hashes)


def split_and_lose_what_moves(self: Generation) -> None:
    real_split(self)
    self._buckets[-1] = b""


def replace_the_filter_without_carrying(self: Generation, added: int) -> None:
    real_tend(self, added)
    if self._next is not None:
        self._filter, self._next = self._next, None


def bounds_that_do_not_touch(self: Container, low: int, high: int) -> int:
    new = real_bounds(self, low, high)
    if high in self.bounds:
        self.bounds[self.bounds.index(high)] = high - 1 if high - low > 1 else high
    return new


def runs_counted_wrong(self: Container, bits: bitarray, low: int, high: int) -> int:
    runs = self.run_count
    new = real_bits(self, bits, low, high)
    self.run_count = max(runs, self.run_count)
    return new


real_split, real_tend = Generation._split, Generation._tend_filter
real_bounds, real_bits = Container._add_to_bounds, Container._add_to_bits


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@pytest.mark.parametrize(
    ("owner", "name", "bug"),
    [
        (Generation, "find", trust_the_filter),
        (Generation, "_split", split_and_lose_what_moves),
        (Generation, "_tend_filter", replace_the_filter_without_carrying),
        (Container, "_add_to_bounds", bounds_that_do_not_touch),
        (Container, "_add_to_bits", runs_counted_wrong),
    ],
)
def test_a_planted_bug_is_caught(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, bug: Callable[..., Any]
) -> None:
    monkeypatch.setattr(owner, name, bug)
    with pytest.raises((AssertionError, ValueError)):
        trial(400, fixed=True, phases=PHASES)()


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
def test_retiring_early_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ExecutedSet.retire
    monkeypatch.setattr(ExecutedSet, "retire", lambda self, now_ms: real(self, now_ms + RETENTION_MS))
    with pytest.raises(AssertionError):
        trial(400, fixed=True, phases=PHASES)()
