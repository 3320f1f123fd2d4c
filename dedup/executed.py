"""The executed set: every task id that is closed for good.

An id that is in stays in: range ids for ever, since they collapse to next to nothing (dedup/ranges.py); keyed
ids for the retention, which must be longer than anything can bring the task back: log retention, the longest
delay and all retries.

Keyed ids are kept by generations of ledger time (dedup/keyed.py): a generation takes keys for a quarter of the
retention, and leaves as a whole once its newest key is older than the retention. So a key is remembered for at
least the retention, at most a quarter longer, and at most six generations live.

What is answered is always exact. The Bloom filters only spare the exact look-up of ids that are surely new.

The ledger is replicated, so all of this is a function of the calls that change it: no clock, no randomness,
no order of a hash table. Equal calls give equal snapshot bytes, also with a restore anywhere in between.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from itertools import compress

from bitarray import bitarray
from bitarray.util import zeros

from dedup.bloom import SEED_MAX, Hashes, hash_keys
from dedup.ids import KEY_BYTES, Ids, TaskId
from dedup.keyed import FILTER_ERROR_RATE, Generation
from dedup.ranges import RangeSet, Spans, extend

RETENTION_MS = 14 * 24 * 3600 * 1000
GENERATIONS_PER_RETENTION = 4

_MAGIC = b"OKEXEC"
_VERSION = 1
_HEADER = struct.Struct("<6sHQQdI")  # magic, version, seed, retention, error rate, generations
_CHECKSUM = struct.Struct("<I")  # CRC-32 of all before it
_FREE_PER_CALL = 2000


class ExecutedSet:
    """An exact set of task ids, made for batches."""

    def __init__(
        self,
        seed: int,
        keyed_retention_ms: int = RETENTION_MS,
        error_rate: float = FILTER_ERROR_RATE,
    ) -> None:
        if not 0 <= seed <= SEED_MAX:
            raise ValueError(f"seed={seed} must be from 0 to {SEED_MAX}")
        if keyed_retention_ms < GENERATIONS_PER_RETENTION:
            raise ValueError(
                f"keyed_retention_ms={keyed_retention_ms} must be {GENERATIONS_PER_RETENTION} or more"
            )
        self._seed = seed
        self._retention_ms = keyed_retention_ms
        self._error_rate = error_rate
        self._ranges = RangeSet()
        self._generations: list[Generation] = []  # oldest first
        self._garbage: list[bytes] = []  # buckets of retired generations, freed a few a call

    def __contains__(self, task_id: TaskId) -> bool:
        if isinstance(task_id, int):
            return task_id in self._ranges
        return self._known((task_id,), self._hashes((task_id,))).any()

    @property
    def count(self) -> int:
        """Ids that are in: executed ever, and not retired."""
        return self._ranges.count + self.keyed_count

    @property
    def keyed_count(self) -> int:
        return sum(generation.count for generation in self._generations)

    @property
    def generations(self) -> int:
        return len(self._generations)

    def spans(self, ids: Ids) -> list[tuple[int, bool]]:
        """Which of ``ids`` are executed, in their order, as (count, executed); neighbours differ."""
        spans: Spans = []
        for start, count in ids.runs:
            self._ranges.read(start, count, spans)
        if ids.keys:
            _extend_by_bits(spans, self._known(ids.keys, self._hashes(ids.keys)))
        return spans

    def surely_new(self, keys: Sequence[bytes]) -> list[tuple[int, bool]]:
        """What the Bloom filters alone say of ``keys``, as (count, surely new). False means: ask ``spans``."""
        hashes = self._hashes(keys)
        new = zeros(len(keys), endian="little")
        for generation in self._generations:
            new |= generation.perhaps(hashes)
        new.invert()
        spans: Spans = []
        _extend_by_bits(spans, new)
        return spans

    def add(self, ids: Ids, now_ms: int) -> int:
        """Mark ``ids`` as executed at this ledger time; how many were new.

        A key that is in already stays in its generation: its retention counts from the first time.
        ValueError (and nothing changed) on an id that cannot be one.
        """
        RangeSet.check(ids.runs)
        keys = list(dict.fromkeys(ids.keys))
        hashes = self._hashes(keys)
        self._free_some()
        new = sum([self._ranges.add(start, count) for start, count in ids.runs])
        if not keys:
            return new
        known = self._known(keys, hashes)
        if known.any():
            known.invert()
            keys = [keys[at] for at in known.search(1)]
            hashes = hashes.pick(known)
        if keys:
            self._generation_at(now_ms).add(keys, hashes, now_ms)
        return new + len(keys)

    def retire(self, now_ms: int) -> int:
        """Forget the generations whose newest key is older than the retention; how many ids that were."""
        self._free_some()
        retired = 0
        while self._generations and now_ms - self._generations[0].newest_ms > self._retention_ms:
            generation = self._generations.pop(0)
            retired += generation.count
            self._garbage += generation.give_up()
        return retired

    def snapshot(self) -> bytes:
        """The whole set as bytes, for ``restore``."""
        pieces = [
            _HEADER.pack(
                _MAGIC, _VERSION, self._seed, self._retention_ms, self._error_rate, len(self._generations)
            )
        ]
        pieces += self._ranges.snapshot()
        for generation in self._generations:
            pieces += generation.snapshot()
        checksum = 0
        for piece in pieces:
            checksum = zlib.crc32(piece, checksum)
        pieces.append(_CHECKSUM.pack(checksum))
        return b"".join(pieces)

    @classmethod
    def restore(cls, data: bytes) -> ExecutedSet:
        """The set whose ``snapshot`` this is; ValueError says what is wrong with the bytes."""
        if len(data) < _HEADER.size + _CHECKSUM.size or not data.startswith(_MAGIC):
            raise ValueError(f"these {len(data)} bytes are not a snapshot of an executed set")
        _, version, seed, retention_ms, error_rate, generations = _HEADER.unpack_from(data)
        if version != _VERSION:
            raise ValueError(f"a snapshot of version {version} cannot be read: this program reads {_VERSION}")
        body = memoryview(data)[: -_CHECKSUM.size]
        (checksum,) = _CHECKSUM.unpack_from(data, len(body))
        if zlib.crc32(body) != checksum:
            raise ValueError("a snapshot of an executed set is damaged: its checksum differs")
        executed = cls(seed, retention_ms, error_rate)
        try:
            executed._ranges, at = RangeSet.restore(body, _HEADER.size)
            for _ in range(generations):
                generation, at = Generation.restore(body, at, seed, error_rate)
                executed._generations.append(generation)
        except struct.error as error:
            raise ValueError(f"a snapshot of an executed set ends early: {error}") from None
        if at != len(body):
            raise ValueError(f"a snapshot of an executed set has {len(body) - at} bytes too many")
        return executed

    def _hashes(self, keys: Sequence[bytes]) -> Hashes:
        # The tables hold keys end to end: one of another length would shift all behind it.
        if keys and set(map(len, keys)) != {KEY_BYTES}:
            raise ValueError(f"a keyed id must have {KEY_BYTES} bytes")
        return hash_keys(keys, self._seed)

    def _known(self, keys: Sequence[bytes], hashes: Hashes) -> bitarray:
        """A bit a key: whether it is in. Newest generation first: duplicates mostly follow soon."""
        known = zeros(len(keys), endian="little")
        places: Sequence[int] = range(len(keys))  # of the keys that are not found yet
        for generation in reversed(self._generations):
            found = generation.find(keys, hashes)
            if not found.any():
                continue
            known[list(compress(places, found))] = 1
            if found.all():
                break
            found.invert()
            places, keys = list(compress(places, found)), list(compress(keys, found))
            hashes = hashes.pick(found)
        return known

    def _generation_at(self, now_ms: int) -> Generation:
        """The generation that takes keys at this time. Ledger time never goes back."""
        span_ms = self._retention_ms // GENERATIONS_PER_RETENTION
        if not self._generations or now_ms - self._generations[-1].start_ms >= span_ms:
            self._generations.append(Generation(self._seed, now_ms, self._error_rate))
        return self._generations[-1]

    def _free_some(self) -> None:
        if self._garbage:
            del self._garbage[-_FREE_PER_CALL:]


def _extend_by_bits(spans: Spans, bits: bitarray) -> None:
    at, value = 0, bool(bits[0]) if bits else False
    while at < len(bits):
        end = bits.find(not value, at)
        end = len(bits) if end < 0 else end
        extend(spans, end - at, value)
        at, value = end, not value
