"""The executed keyed ids of one generation: a Bloom filter in front, an exact hash table behind.

The table is *linear hashing* (Litwin 1980): buckets that grow one at a time. Bucket i is a ``bytes`` object, its
keys end to end; a key's bucket is the low bits of its seeded hash, so ids that a stranger made up (a keyed id on
the wire is any 16 bytes) spread like any others; and MurmurHash3 of one 16-byte block is a bijection, so no
two keys share a whole hash. A key is looked for with ``bytes.find``, which is C. When the mean bucket is over its
fill, the next bucket in turn splits in two. Hence:

- no add ever pays for the whole table. Sorted runs, the obvious way, must merge, and a plain hash table must
  rehash: each is a stall of seconds at ten million keys, on a loop that has heartbeats to send;
- 18 bytes a key in all, because a bucket is as long as its keys. Sorted runs of bare 16-byte keys are hardly
  smaller, and cost a bisection in Python (23 steps at ten million keys) where this costs one ``find``.

A Bloom filter cannot grow, so it is replaced: when it is three quarters full, a filter of twice its capacity is
begun; each add carries a few old buckets over to it, and by the time the old filter is full the new one takes
its place. That work, too, is in proportion to the add that does it.

Layout and filter are a function of the sequence of adds alone, and a snapshot holds both as they are.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from itertools import compress
from operator import itemgetter

from bitarray import bitarray

from dedup.bloom import BloomFilter, Hashes, hash_keys
from dedup.ids import KEY_BYTES

FILTER_KEYS_MIN = 4096
FILTER_ERROR_RATE = 0.01

_KEY_MASK = KEY_BYTES - 1
_FILL = 64  # keys in the mean bucket when one splits
_CARRY = 5  # keys carried to the next filter for each key added
# A look-up behind the filter costs about eight probes. In a flood of duplicates the first probe rules out nearly
# nothing, and no second one is made.
_GAIN_MIN = 1 / 8
_GENERATION = struct.Struct("<QQQQQ")  # start_ms, newest_ms, count, buckets, carried
_FILTER = struct.Struct("<QB")  # bytes of it, whether it is the next one


class Generation:
    """Keys that were added within one stretch of ledger time, and leave together."""

    def __init__(self, seed: int, start_ms: int, error_rate: float = FILTER_ERROR_RATE) -> None:
        self.start_ms = start_ms
        self.newest_ms = start_ms
        """When the last key was added."""
        self.count = 0
        self._seed = seed
        self._error_rate = error_rate
        self._buckets: list[bytes] = [b""]
        self._mask = 1  # 2**(L+1) - 1 for 2**L <= len(buckets) < 2**(L+1)
        self._filter = BloomFilter(FILTER_KEYS_MIN, error_rate)
        self._next: BloomFilter | None = None
        self._carried = 0  # buckets below this are in the next filter

    def perhaps(self, hashes: Hashes) -> bitarray:
        """A bit a key: 0 = surely not here."""
        return self._filter.query(hashes)

    def find(self, keys: Sequence[bytes], hashes: Hashes) -> bitarray:
        """A bit a key: whether it is here, exactly."""
        found = self._filter.query(hashes, _GAIN_MIN)
        if not found.any():
            return found
        likely = None if found.all() else list(found.search(1))
        if likely is None:
            numbers = self._numbers(hashes.a)
            looked_for = keys
        else:
            numbers = self._numbers([hashes.a[at] for at in likely])
            looked_for = [keys[at] for at in likely]
        # All buckets are taken hold of before the first is searched: in a loop this tight the processor waits
        # for many of them at a time, and at ten million keys that waiting is most of the work. (The 0 is
        # there because a lone number would give a bucket instead of a tuple.)
        buckets = itemgetter(*numbers, 0)(self._buckets)
        places = list(map(bytes.find, buckets, looked_for))
        # Neither -1 nor a match across the border of two keys is a multiple of the key's size.
        doubtful = [at for at, place in enumerate(places) if place & _KEY_MASK]
        for at in doubtful:
            if not _holds(buckets[at], looked_for[at], places[at]):
                found[at if likely is None else likely[at]] = 0
        return found

    def add(self, keys: Sequence[bytes], hashes: Hashes, now_ms: int) -> None:
        """Add keys of which none is here and none is twice in the batch."""
        buckets = self._buckets
        for key, number in zip(keys, self._numbers(hashes.a), strict=True):
            buckets[number] += key
        self.count += len(keys)
        self.newest_ms = max(self.newest_ms, now_ms)
        while self.count > _FILL * len(self._buckets):
            self._split()
        self._filter.add(hashes)
        if self._next is not None:
            self._next.add(hashes)
        self._tend_filter(len(keys))

    def snapshot(self) -> Iterator[bytes]:
        header = (self.start_ms, self.newest_ms, self.count, len(self._buckets), self._carried)
        yield _GENERATION.pack(*header)
        sizes = [len(bucket) // KEY_BYTES for bucket in self._buckets]
        yield struct.pack(f"<{len(sizes)}I", *sizes)
        yield from self._buckets
        for bloom in (self._filter, self._next):
            if bloom is not None:
                data = bloom.snapshot()
                yield _FILTER.pack(len(data), bloom is self._next)
                yield data
        yield _FILTER.pack(0, 0)

    @classmethod
    def restore(cls, data: memoryview, at: int, seed: int, error_rate: float) -> tuple[Generation, int]:
        """The generation at offset ``at``, and the offset behind it. ValueError or struct.error on bad bytes."""
        start_ms, newest_ms, count, buckets, carried = _GENERATION.unpack_from(data, at)
        at += _GENERATION.size
        generation = cls(seed, start_ms, error_rate)
        generation.newest_ms, generation.count, generation._carried = newest_ms, count, carried
        sizes = struct.unpack_from(f"<{buckets}I", data, at)
        at += 4 * buckets
        if buckets < 1 or carried > buckets or newest_ms < start_ms:
            raise ValueError(f"a generation of {buckets} buckets from {start_ms} to {newest_ms} cannot be")
        if sum(sizes) != count or at + count * KEY_BYTES > len(data):
            raise ValueError(f"a generation does not hold the {count} keys that it should")
        generation._buckets = []
        for size in sizes:
            end = at + size * KEY_BYTES
            generation._buckets.append(bytes(data[at:end]))
            at = end
        generation._mask = (1 << buckets.bit_length()) - 1
        found: list[BloomFilter | None] = [None, None]
        while True:
            length, is_next = _FILTER.unpack_from(data, at)
            at += _FILTER.size
            if length == 0:
                break
            if is_next > 1 or at + length > len(data):
                raise ValueError("the bytes end within a Bloom filter")
            found[is_next] = BloomFilter.restore(data[at : at + length])
            at += length
        if found[0] is None:
            raise ValueError("a generation is without its Bloom filter")
        generation._filter, generation._next = found[0], found[1]
        return generation, at

    def give_up(self) -> list[bytes]:
        """The buckets, for the owner to let go of bit by bit: freeing millions of keys at once is a stall."""
        buckets, self._buckets = self._buckets, [b""]
        return buckets

    def _numbers(self, a: Sequence[int]) -> list[int]:
        """The bucket of each hash: by L + 1 bits of it, or by L if that bucket is not split off yet."""
        mask, total = self._mask, len(self._buckets)
        half = mask >> 1
        return [number if (number := x & mask) < total else number & half for x in a]

    def _split(self) -> None:
        """Divide the next bucket in turn by one more bit of the hash."""
        total = len(self._buckets)
        bit = (self._mask + 1) >> 1  # 2**L, so the turn is at bucket total - 2**L
        turn = total - bit
        keys = _keys_of(self._buckets[turn])
        moves = [a & bit for a in hash_keys(keys, self._seed).a]
        self._buckets[turn] = b"".join([key for key, move in zip(keys, moves, strict=True) if not move])
        self._buckets.append(b"".join(compress(keys, moves)))
        if total + 1 == 2 * bit:
            self._mask = 2 * self._mask + 1

    def _tend_filter(self, added: int) -> None:
        """Begin, go on with, or finish the replacement of a filter that fills up."""
        if self._next is None:
            if 4 * self.count < 3 * self._filter.capacity:
                return
            self._next = BloomFilter(2 * max(self._filter.capacity, self.count), self._error_rate)
            self._carried = 0
        end = self._carried + 1 + added * _CARRY // _FILL
        keys = _keys_of(b"".join(self._buckets[self._carried : end]))
        self._next.add(hash_keys(keys, self._seed))
        # A bucket that splits after it was carried leaves keys at the end of the list, and they are carried
        # again: no harm. So once the end is reached, every key is in.
        self._carried = end
        if end >= len(self._buckets):
            self._filter, self._next, self._carried = self._next, None, 0


def _holds(bucket: bytes, key: bytes, place: int) -> bool:
    """Whether ``bucket`` holds ``key`` at a border, given the first place where its bytes are."""
    while place & _KEY_MASK and place >= 0:
        place = bucket.find(key, place + 1)
    return place >= 0


def _keys_of(bucket: bytes) -> list[bytes]:
    return [bucket[at : at + KEY_BYTES] for at in range(0, len(bucket), KEY_BYTES)]
