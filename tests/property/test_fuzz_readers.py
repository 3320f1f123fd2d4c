"""Whatever bytes a reader is given: an answer or the documented refusal, in bounded memory, and nothing is run.

The targets and their seeds stand in tests/support/fuzz_targets.py; ``make fuzz`` gives the same ones to a fuzzer
that sees which branches are taken, for as long as one likes.
"""

from __future__ import annotations

import functools
import os
import sys
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.fuzz_targets import BOMB, TARGETS
from tests.support.raft_bomb import went_off

EXAMPLES = int(os.environ.get("ONCEKEEPER_TEST_FUZZ_EXAMPLES", "60"))
# Beyond what a reader holds anyway. A length that is believed before it is compared is far above it at once.
MEMORY_BYTES_MAX = 24 * 1024 * 1024
FORBIDDEN = ("exec", "compile", "import", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen",
             "pickle.find_class", "marshal.loads", "ctypes.dlopen", "socket.connect")  # fmt: skip

_watched: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is not None and event in FORBIDDEN:
        _watched.append(f"{event} {arguments[:1]!r}"[:200])


sys.addaudithook(_audit)  # for the life of the process; it looks at nothing outside of a target


@pytest.fixture
def watched() -> Iterator[list[str]]:
    """What the interpreter was asked to run meanwhile."""
    found: list[str] = []
    yield found
    assert not went_off()


@functools.cache
def warm(name: str) -> None:
    """What a reader imports and makes at its first use is no work of the bytes."""
    for seed in TARGETS[name].seeds:
        TARGETS[name](seed)


def read(name: str, data: bytes, found: list[str]) -> None:
    global _watched
    warm(name)
    _watched = found
    try:
        TARGETS[name](data)
    finally:
        _watched = None
    assert found == [], data


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "insert", "cut", "repeat", "number", "splice", "bomb"]),
        st.floats(0, 1, exclude_max=True),
        st.binary(max_size=12),
    ),
    min_size=1,
    max_size=6,
)
NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)


def edited(seeds: tuple[bytes, ...], first: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    data = bytearray(first)
    for kind, place, some in edits:
        at = int(place * (len(data) + 1))
        match kind:
            case "set":
                data[at : at + len(some)] = some
            case "insert":
                data[at:at] = some
            case "cut":
                del data[at : at + len(some) * 3]
            case "repeat":
                data[at:at] = data[max(0, at - 40) : at] * (len(some) + 1)
            case "number":
                number = NUMBERS[sum(some) % len(NUMBERS)]
                width = 8 if number >= 2**32 else 4
                data[at : at + width] = number.to_bytes(width, ("big", "little")[len(some) % 2])
            case "splice":
                other = seeds[sum(some) % len(seeds)]
                data[at:] = other[int(place * len(other)) :]
            case _:
                data[at:at] = BOMB
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(draw=st.data())
def test_a_reader_answers_or_refuses_whatever_the_bytes(name: str, watched: list[str], draw: st.DataObject):
    seeds = TARGETS[name].seeds
    first = draw.draw(st.one_of(st.sampled_from(seeds), st.binary(max_size=400)))
    read(name, edited(seeds, first, draw.draw(EDITS)), watched)


@pytest.mark.parametrize("name", TARGETS)
def test_a_reader_answers_or_refuses_every_seed_cut_anywhere_and_with_any_byte_wrong(
    name: str, watched: list[str]
):
    for seed in TARGETS[name].seeds:
        read(name, seed, watched)
        for at in range(0, len(seed), max(1, len(seed) // 60)):
            read(name, seed[:at], watched)
            for byte in (0, 0xFF, seed[at] ^ 0x80):
                read(name, seed[:at] + bytes([byte]) + seed[at + 1 :], watched)


@pytest.mark.parametrize("name", TARGETS)
def test_a_reader_believes_no_length_before_it_has_compared_it(name: str):
    """Every seed with the largest numbers at every place: what is allocated stays near what was given."""
    for seed in TARGETS[name].seeds:
        TARGETS[name](seed)
        tracemalloc.start()
        try:
            for at in range(0, len(seed), max(1, len(seed) // 25)):
                for huge in (
                    b"\xff" * 8,
                    b"\x7f" + b"\xff" * 7,
                    b"\xdd\x7f\xff\xff\xff",
                    b"\xc6\x7f\xff\xff\xff",
                ):
                    TARGETS[name](seed[:at] + huge + seed[at + len(huge) :])
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < MEMORY_BYTES_MAX, (name, seed[:80])


def test_the_watch_itself_sees_what_unpickling_would_do(watched: list[str]):
    import pickle

    global _watched
    _watched = watched
    try:
        pickle.loads(BOMB)  # noqa: S301  # the bomb goes off here on purpose
    finally:
        _watched = None
    assert any("find_class" in each for each in watched)
    assert went_off()
