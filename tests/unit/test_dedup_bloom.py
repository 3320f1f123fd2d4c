"""The Bloom filter: what it is sized to, what it never does, and its bytes."""

from __future__ import annotations

import hashlib
import struct

import mmh3
import pytest

from dedup.bloom import BloomFilter, bits_and_probes, hash_keys

SEED = 0x1234_5678_9ABC_DEF0


def keys_of(name: str, count: int) -> list[bytes]:
    return [hashlib.blake2b(f"{name}-{i}".encode(), digest_size=16).digest() for i in range(count)]


@pytest.mark.parametrize("target", [0.1, 0.01, 0.001])
def test_a_filter_at_its_capacity_errs_at_the_rate_it_was_sized_for(target: float) -> None:
    bloom = BloomFilter(20_000, target)
    bloom.add(hash_keys(keys_of("in", 20_000), SEED))
    errors = bloom.query(hash_keys(keys_of("out", 100_000), SEED)).count()
    assert 0.8 * target < errors / 100_000 < 1.2 * target


@pytest.mark.parametrize("gain_min", [0.0, 0.125, 1.0])
def test_what_was_added_is_always_found(gain_min: float) -> None:
    bloom = BloomFilter(10, 0.5)  # far beyond its capacity
    hashes = hash_keys(keys_of("in", 2_000), SEED)
    bloom.add(hashes)
    assert bloom.query(hashes, gain_min).all()


def test_an_empty_filter_holds_nothing_and_an_empty_batch_is_answered() -> None:
    bloom = BloomFilter(100, 0.01)
    assert not bloom.query(hash_keys(keys_of("out", 1_000), SEED)).any()
    assert len(bloom.query(hash_keys([], SEED))) == 0


def test_a_batch_is_answered_like_its_keys_one_by_one() -> None:
    bloom = BloomFilter(300, 0.2)
    bloom.add(hash_keys(keys_of("in", 300), SEED))
    keys = [key for pair in zip(keys_of("in", 300), keys_of("out", 300), strict=True) for key in pair]
    one_by_one = [bool(bloom.query(hash_keys([key], SEED))[0]) for key in keys]
    assert [bool(bit) for bit in bloom.query(hash_keys(keys, SEED))] == one_by_one


def test_the_seed_decides_which_keys_collide() -> None:
    out = keys_of("out", 20_000)
    wrong = []
    for seed in (1, 2):
        bloom = BloomFilter(500, 0.1)
        bloom.add(hash_keys(keys_of("in", 500), seed))
        wrong.append(set(bloom.query(hash_keys(out, seed)).search(1)))
    assert wrong[0]
    assert wrong[1]
    # Independent sets of a tenth of all share a hundredth of all.
    assert len(wrong[0] & wrong[1]) < 0.02 * len(out)


def test_hashes_are_the_two_halves_of_murmur3() -> None:
    keys = keys_of("any", 3)
    hashes = hash_keys(keys, 7)
    assert list(zip(hashes.a, hashes.b, strict=True)) == [mmh3.mmh3_x64_128_utupledigest(k, 7) for k in keys]


def test_few_probes_cost_few_bits() -> None:
    bits, probes = bits_and_probes(1_000_000, 0.01)
    assert probes == 4
    assert 9_585_059 < bits < 1.15 * 9_585_059  # the least, at 7 probes, is n * log2(1/p) / ln 2
    assert bits % 64 == 0


def test_a_restored_filter_is_equal_and_goes_on() -> None:
    bloom = BloomFilter(1_000, 0.01)
    bloom.add(hash_keys(keys_of("in", 500), SEED))
    again = BloomFilter.restore(bloom.snapshot())
    for each in (bloom, again):
        each.add(hash_keys(keys_of("more", 500), SEED))
    assert again.snapshot() == bloom.snapshot()
    assert (again.capacity, again.probes, again.added) == (1_000, bloom.probes, 1_000)


@pytest.mark.parametrize(("capacity", "rate"), [(0, 0.01), (-1, 0.01), (10, 0.0), (10, 1.0), (10, 1.5)])
def test_a_size_that_cannot_be_is_refused(capacity: int, rate: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        BloomFilter(capacity, rate)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        BloomFilter(10, 0.1).snapshot()[:-1],
        BloomFilter(10, 0.1).snapshot() + b"x",
        struct.pack("<QQBQ", 64, 1, 0, 0) + bytes(8),
        struct.pack("<QQBQ", 60, 1, 1, 0) + bytes(8),
    ],
)
def test_bytes_that_are_no_filter_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="Bloom filter"):
        BloomFilter.restore(data)
