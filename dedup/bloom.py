"""A Bloom filter: answers *surely not added*, or *perhaps added*; never loses what was added (Bloom 1970).

Double hashing (Kirsch & Mitzenmacher 2006): from one 128-bit MurmurHash3 of a key come two 64-bit numbers a
and b, and the k positions are (a + i*b) mod m. This is asymptotically as good as k independent hashes, for
one hash a key. The seed is the cluster's, so that a stranger cannot prepare keys that collide.

Sizing: with n keys in m bits the error rate is p = (1 - e^(-k*n/m))^k, so m = -k*n / ln(1 - p^(1/k)). The
least m is at k = log2(1/p), but near it m is flat while the time of a query is linear in k. So k is the least
whose m is within 15 % of the least: for p = 1 % that is 4 probes at 10.5 bits a key instead of 7 at 9.6.

Keys come in batches, because the interpreter is slow and C is fast: one ``struct.unpack`` splits all hashes,
and a bitarray is read and written by a whole list of positions. A query goes probe by probe over the keys
that are still possible, so a batch of new keys costs about two probes a key at any k.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterable, Sequence
from itertools import compress
from typing import NamedTuple

import mmh3
from bitarray import bitarray

SEED_MAX = 2**64 - 1
PROBES_MAX = 64

_SIZE_SLACK = 1.15
_WORD = 64  # m is a multiple
_SNAPSHOT = struct.Struct("<QQBQ")  # m, capacity, k, added


class Hashes(NamedTuple):
    """Two 64-bit numbers a key, in the order of the keys."""

    a: Sequence[int]
    b: Sequence[int]

    def pick(self, selectors: Iterable[int]) -> Hashes:
        """The hashes at which ``selectors`` is true."""
        return Hashes(list(compress(self.a, selectors)), list(compress(self.b, selectors)))


def hash_keys(keys: Sequence[bytes], seed: int) -> Hashes:
    """Hash a batch once; the result serves every filter and table of the same seed."""
    seed32 = (seed ^ (seed >> 32)) & 0xFFFFFFFF  # what mmh3 takes
    digest = mmh3.mmh3_x64_128_digest
    numbers = struct.unpack(f"<{2 * len(keys)}Q", b"".join([digest(key, seed32) for key in keys]))
    return Hashes(numbers[::2], numbers[1::2])


def bits_and_probes(capacity: int, error_rate: float) -> tuple[int, int]:
    """m and k for ``capacity`` keys at ``error_rate``."""

    def bits(probes: int) -> float:
        return -probes * capacity / math.log1p(-(error_rate ** (1 / probes)))

    best = max(1, min(PROBES_MAX, round(-math.log2(error_rate))))
    limit = _SIZE_SLACK * bits(best)
    probes = next(k for k in range(1, best + 1) if bits(k) <= limit)
    # In whole words, and from few digits: replicas on machines whose logarithms differ in the last bit agree.
    return _WORD * math.ceil(round(bits(probes), 3) / _WORD), probes


class BloomFilter:
    """A filter for ``capacity`` keys at ``error_rate``; beyond its capacity the rate rises, no more."""

    def __init__(self, capacity: int, error_rate: float) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity} must be at least 1")
        if not 0 < error_rate < 1:
            raise ValueError(f"error_rate={error_rate} must be between 0 and 1, both exclusive")
        size, self._probes = bits_and_probes(capacity, error_rate)
        self._bits = _clear_bits(size)
        self.capacity = capacity
        self.added = 0
        """Additions so far; a key added twice counts twice."""

    @property
    def bits(self) -> int:
        return len(self._bits)

    @property
    def probes(self) -> int:
        return self._probes

    def add(self, hashes: Hashes) -> None:
        size, bits = len(self._bits), self._bits
        places = [x % size for x in hashes.a]
        bits[places] = 1
        for _ in range(1, self._probes):
            places = [(place + y) % size for place, y in zip(places, hashes.b, strict=True)]
            bits[places] = 1
        self.added += len(places)

    def query(self, hashes: Hashes, gain_min: float = 0.0) -> bitarray:
        """A bit a key: 0 = surely not added, 1 = perhaps added.

        A probe that rules out less than the share ``gain_min`` of the keys that were still possible is the
        last one: who verifies what is left need not pay for probes that only confirm it.
        """
        size, bits = len(self._bits), self._bits
        steps = hashes.b
        places = [x % size for x in hashes.a]
        perhaps = hits = bits[places]
        possible: Sequence[int] | None = None  # the keys that hits is about; None = all
        for _ in range(1, self._probes):
            hit_count = hits.count()
            if hit_count == 0 or len(hits) - hit_count < gain_min * len(hits):
                break
            if hit_count < len(hits):
                places, steps = list(compress(places, hits)), list(compress(steps, hits))
                possible = list(compress(range(len(hits)) if possible is None else possible, hits))
            places = [(place + step) % size for place, step in zip(places, steps, strict=True)]
            hits = bits[places]
            if possible is None:
                perhaps = hits
            else:
                perhaps[possible] = hits
        return perhaps

    def snapshot(self) -> bytes:
        header = _SNAPSHOT.pack(self.bits, self.capacity, self._probes, self.added)
        return header + self._bits.tobytes()

    @classmethod
    def restore(cls, data: bytes | memoryview) -> BloomFilter:
        """The filter whose ``snapshot`` this is; ValueError says what is wrong with it."""
        if len(data) < _SNAPSHOT.size:
            raise ValueError(f"a Bloom filter of {len(data)} bytes is shorter than its header")
        size, capacity, probes, added = _SNAPSHOT.unpack_from(data)
        body = data[_SNAPSHOT.size :]
        if size < 1 or size % _WORD or capacity < 1 or not 1 <= probes <= PROBES_MAX:
            raise ValueError(f"a Bloom filter of {size} bits, {capacity} keys and {probes} probes cannot be")
        if 8 * len(body) != size:
            raise ValueError(f"a Bloom filter of {size} bits has {len(body)} bytes of them")
        bloom = cls.__new__(cls)
        bloom._bits = _clear_bits(size)
        memoryview(bloom._bits)[:] = body
        bloom._probes, bloom.capacity, bloom.added = probes, capacity, added
        return bloom


def _clear_bits(size: int) -> bitarray:
    """``size`` bits, all 0, in pages of their own that the kernel clears when they are first touched.

    Megabytes out of the heap are cleared at once, and that is a stall of tens of milliseconds.
    """
    pages = mmap.mmap(-1, size // 8, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return bitarray(buffer=pages, endian="little")
