"""The executed set: forms of a container, generations, snapshots, and ids that mean harm."""

from __future__ import annotations

import hashlib
import struct
import zlib

import pytest

from dedup import keyed
from dedup.executed import ExecutedSet
from dedup.ids import RANGE_ID_MAX, Ids
from dedup.ranges import CONTAINER_IDS, RUNS_MAX

SEED = 0xFEED_BEEF_1234_5678
RETENTION_MS = 4_000


def new_set() -> ExecutedSet:
    return ExecutedSet(SEED, RETENTION_MS)


def keys_of(name: str, count: int) -> tuple[bytes, ...]:
    return tuple(hashlib.blake2b(f"{name}-{i}".encode(), digest_size=16).digest() for i in range(count))


def run(start: int, count: int) -> Ids:
    return Ids(((start, count),))


# --- range ids ------------------------------------------------------------------------------------------------


def test_a_billion_neighbours_are_a_few_entries() -> None:
    executed = new_set()
    assert executed.add(run(1, 10**9), 0) == 10**9
    assert executed.count == 10**9
    assert len(executed.snapshot()) < 200
    assert executed.spans(run(10**9 - 5, 10)) == [(6, True), (4, False)]


def test_one_id_of_a_range_costs_bytes_and_not_a_bitmap() -> None:
    executed = new_set()
    for node in range(1_000):
        executed.add(run(1 + node * CONTAINER_IDS, 1), 0)
    assert len(executed.snapshot()) < 1_000 * 32 + 200


def test_a_container_with_many_runs_becomes_a_bitmap_and_a_run_again_when_its_holes_close() -> None:
    executed = new_set()
    odd = Ids(tuple((number, 1) for number in range(1, CONTAINER_IDS, 2)))
    assert executed.add(odd, 0) == CONTAINER_IDS // 2
    assert executed.spans(run(1, 4)) == [(1, True), (1, False), (1, True), (1, False)]
    assert CONTAINER_IDS // 8 < len(executed.snapshot()) < CONTAINER_IDS // 8 + 200
    even = Ids(tuple((number, 1) for number in range(2, CONTAINER_IDS, 2)))
    assert executed.add(even, 0) == CONTAINER_IDS // 2 - 1
    assert executed.spans(run(1, CONTAINER_IDS)) == [(CONTAINER_IDS - 1, True), (1, False)]
    assert len(executed.snapshot()) < 200


def test_equal_content_is_equal_bytes_on_both_sides_of_a_change_of_form() -> None:
    for runs in (RUNS_MAX // 2, RUNS_MAX, RUNS_MAX + 1):
        kept = [(CONTAINER_IDS + 10 * number, 3) for number in range(runs)]
        up, down = new_set(), new_set()
        up.add(Ids(tuple(kept)), 0)
        # From a bitmap of many runs, by closing gaps, to the same content.
        crumbs = [(start + offset, 1) for start, _ in kept for offset in (0, 2)]
        down.add(Ids(tuple(crumbs)), 0)
        down.add(Ids(tuple((start + 1, 1) for start, _ in reversed(kept))), 0)
        assert up.snapshot() == down.snapshot()


def test_the_first_and_the_last_id_can_be_executed() -> None:
    executed = new_set()
    assert executed.add(Ids(((1, 1), (RANGE_ID_MAX, 1))), 0) == 2
    assert 1 in executed
    assert RANGE_ID_MAX in executed
    assert 2 not in executed
    assert executed.spans(run(RANGE_ID_MAX - 1, 2)) == [(1, False), (1, True)]
    assert ExecutedSet.restore(executed.snapshot()).snapshot() == executed.snapshot()


@pytest.mark.parametrize("bad", [(0, 1), (-5, 3), (5, 0), (5, -1), (RANGE_ID_MAX, 2)])
def test_a_run_that_cannot_be_is_refused_and_nothing_is_changed(bad: tuple[int, int]) -> None:
    executed = new_set()
    with pytest.raises(ValueError, match="a run holds ids from 1"):
        executed.add(Ids(((10, 5), bad), keys_of("k", 1)), 0)
    assert executed.snapshot() == new_set().snapshot()


# --- keyed ids ------------------------------------------------------------------------------------------------


def test_a_key_twice_in_a_batch_is_new_once() -> None:
    executed = new_set()
    (key,) = keys_of("k", 1)
    assert executed.add(Ids((), (key, key)), 0) == 1
    assert executed.spans(Ids((), (key, key))) == [(2, True)]


def test_surely_new_is_never_said_of_an_executed_key() -> None:
    executed = ExecutedSet(SEED, RETENTION_MS, error_rate=0.9)
    known, unknown = keys_of("in", 3_000), keys_of("out", 3_000)
    executed.add(Ids((), known), 0)
    assert executed.surely_new(known) == [(3_000, False)]
    assert executed.surely_new(()) == []
    # Most unknown ones are false positives here, and the answer is exact all the same.
    assert sum(count for count, new in executed.surely_new(unknown) if not new) > 1_000
    assert executed.spans(Ids((), unknown)) == [(3_000, False)]


def test_the_measured_error_rate_is_below_the_target_while_the_set_grows() -> None:
    executed = ExecutedSet(SEED, RETENTION_MS, error_rate=0.05)
    unknown = keys_of("out", 10_000)
    for step in range(20):
        executed.add(Ids((), keys_of(f"in-{step}", 2_000)), 0)
        wrong = sum(count for count, new in executed.surely_new(unknown) if not new)
        assert wrong / len(unknown) < 1.2 * 0.05
    assert executed.spans(Ids((), unknown)) == [(10_000, False)]


def test_a_key_is_remembered_for_the_retention_and_forgotten_with_its_generation() -> None:
    executed = new_set()
    first, second = keys_of("first", 10), keys_of("second", 10)
    executed.add(Ids((), first), 0)
    executed.add(Ids((), second), RETENTION_MS // 4)
    assert executed.generations == 2
    assert executed.retire(RETENTION_MS) == 0
    assert executed.spans(Ids((), first)) == [(10, True)]
    assert executed.retire(RETENTION_MS + 1) == 10
    assert executed.spans(Ids((), first + second)) == [(10, False), (10, True)]
    assert (executed.count, executed.generations) == (10, 1)


def test_range_ids_never_retire() -> None:
    executed = new_set()
    executed.add(run(1, 100), 0)
    assert executed.retire(10 * RETENTION_MS) == 0
    assert executed.spans(run(1, 100)) == [(100, True)]


def test_a_generation_waits_for_its_newest_key() -> None:
    executed = new_set()
    executed.add(Ids((), keys_of("old", 1)), 0)
    executed.add(Ids((), keys_of("new", 1)), RETENTION_MS // 4 - 1)
    assert executed.generations == 1
    assert executed.retire(RETENTION_MS + RETENTION_MS // 4 - 1) == 0
    assert executed.retire(RETENTION_MS + RETENTION_MS // 4) == 2


def test_generations_stay_few_however_long_it_runs() -> None:
    executed = new_set()
    for now_ms in range(0, 20 * RETENTION_MS, 100):
        executed.add(Ids((), keys_of(str(now_ms), 2)), now_ms)
        executed.retire(now_ms)
        assert executed.generations <= 6
    assert executed.keyed_count <= 2 * (RETENTION_MS * 5 // 4) // 100 + 2


def test_a_match_across_the_border_of_two_keys_is_none() -> None:
    executed = new_set()
    left, right = b"\x01" * 8 + b"\x02" * 8, b"\x03" * 8 + b"\x04" * 8
    executed.add(Ids((), (left, right)), 0)
    across = b"\x02" * 8 + b"\x03" * 8
    generation = executed._generations[0]
    hashes = executed._hashes((across,))
    generation._filter.add(hashes)  # as if it were a false positive
    assert executed.surely_new((across,)) == [(1, False)]
    assert executed.spans(Ids((), (across, left, right))) == [(1, False), (2, True)]
    # The real one behind a false match is found.
    executed.add(Ids((), (across,)), 0)
    assert executed.spans(Ids((), (across,))) == [(1, True)]


def test_crafted_keys_with_one_prefix_spread_over_the_buckets() -> None:
    executed = new_set()
    crafted = tuple(b"\x00" * 12 + struct.pack(">I", number) for number in range(40_000))
    suffixed = tuple(struct.pack(">I", number) + b"\xff" * 12 for number in range(40_000))
    executed.add(Ids((), crafted), 0)
    executed.add(Ids((), suffixed), 0)
    sizes = [len(bucket) // 16 for bucket in executed._generations[0]._buckets]
    assert max(sizes) < 4 * keyed._FILL
    assert executed.spans(Ids((), crafted + suffixed)) == [(80_000, True)]


@pytest.mark.parametrize("key", [b"", b"short", bytes(15), bytes(17), bytes(32)])
def test_a_key_of_another_length_is_refused_and_nothing_is_changed(key: bytes) -> None:
    executed = new_set()
    with pytest.raises(ValueError, match="must have 16 bytes"):
        executed.add(Ids(((1, 5),), (*keys_of("k", 2), key)), 0)
    with pytest.raises(ValueError, match="must have 16 bytes"):
        executed.spans(Ids((), (key,)))
    assert executed.snapshot() == new_set().snapshot()


# --- snapshots ------------------------------------------------------------------------------------------------


def test_a_snapshot_taken_at_any_stage_of_growth_goes_on_to_equal_bytes() -> None:
    straight, restored = new_set(), new_set()
    for step in range(60):
        batch = Ids(((1 + 700 * step, 699),), keys_of(f"in-{step}", 400))
        for executed in (straight, restored):
            executed.add(batch, step * 50)
        restored = ExecutedSet.restore(restored.snapshot())
        assert restored.snapshot() == straight.snapshot()
    assert restored.retire(10**6) == straight.retire(10**6) > 0
    assert restored.snapshot() == straight.snapshot()


def sample() -> bytes:
    executed = new_set()
    odd = tuple((number, 1) for number in range(1, 4_000, 2))
    executed.add(Ids((*odd, (CONTAINER_IDS, 3 * CONTAINER_IDS), (10**9, 5)), keys_of("k", 3_000)), 5)
    return executed.snapshot()


def test_bytes_with_any_damage_are_refused() -> None:
    data = sample()
    for at in range(0, len(data), max(1, len(data) // 300)):
        with pytest.raises(ValueError, match="snapshot"):
            ExecutedSet.restore(data[:at])
        with pytest.raises(ValueError, match="snapshot"):
            ExecutedSet.restore(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(ValueError, match="checksum"):
        ExecutedSet.restore(data + b"x")


def test_bytes_that_lie_under_a_good_checksum_end_in_a_value_error_and_nothing_else() -> None:
    data = sample()[:-4]
    refused = 0
    for at in range(8, len(data), max(1, len(data) // 400)):
        for lie in (data[:at], data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]):
            try:
                ExecutedSet.restore(lie + struct.pack("<I", zlib.crc32(lie)))
            except ValueError:
                refused += 1
    assert refused > 400  # all that are cut; a flipped bit of a key is just another key


def test_a_newer_format_is_refused_by_its_number() -> None:
    data = bytearray(new_set().snapshot())
    data[6] = 2
    with pytest.raises(ValueError, match="version 2 cannot be read: this program reads 1"):
        ExecutedSet.restore(bytes(data))


@pytest.mark.parametrize(("seed", "retention_ms"), [(-1, 1_000), (2**64, 1_000), (1, 0), (1, -5)])
def test_settings_that_cannot_be_are_refused(seed: int, retention_ms: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        ExecutedSet(seed, retention_ms)
