"""Identities of tasks, and how many of them travel as one.

A task id is fixed before the first send and never reused. There are two kinds:

- a *range id* is an ``int`` in ``1 .. 2**63 - 1`` out of a range that the cluster allocated by consensus.
  Neighbours stay neighbours, so thousands of them travel and rest as one run ``(start, count)``;
- a *keyed id* is 16 ``bytes``: the BLAKE2b digest of queue and idempotency key. BLAKE2b and not a quick hash,
  because a crafted collision would swallow somebody's task.

Text form (JSON, command line): decimal digits for a range id, ``k`` and 32 hexadecimal digits for a keyed id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import msgspec

RANGE_ID_MAX = 2**63 - 1
KEY_BYTES = 16

TaskId = int | bytes


class Ids(msgspec.Struct, frozen=True, array_like=True):
    """A batch of ids. Its order is: the runs as given, each ascending, and then the keys as given."""

    runs: tuple[tuple[int, int], ...] = ()
    """Runs of range ids as (start, count); count >= 1, start + count - 1 <= RANGE_ID_MAX."""
    keys: tuple[bytes, ...] = ()
    """Keyed ids, 16 bytes each."""

    def __len__(self) -> int:
        if len(self.runs) == 1:  # nearly always, and asked for each task
            return self.runs[0][1] + len(self.keys)
        return sum(count for _, count in self.runs) + len(self.keys)

    def __iter__(self) -> Iterator[TaskId]:
        for start, count in self.runs:
            yield from range(start, start + count)
        yield from self.keys

    def part(self, at: int, count: int) -> Ids:
        """The ids at positions ``at .. at + count - 1`` of this batch's order."""
        if at == 0 and count >= len(self):
            return self
        runs: list[tuple[int, int]] = []
        end = at + count
        position = 0
        for start, length in self.runs:
            low, high = max(at, position), min(end, position + length)
            if low < high:
                runs.append((start + low - position, high - low))
            position += length
        return Ids(tuple(runs), self.keys[max(0, at - position) : max(0, end - position)])


def keyed_id(queue: str, key: str) -> bytes:
    """The 128-bit id of an idempotency key within a queue (BLAKE2b, RFC 7693, personalised)."""
    name = queue.encode()
    # The length goes in front, so that ("ab", "c") and ("a", "bc") differ.
    text = len(name).to_bytes(4, "big") + name + key.encode()
    return hashlib.blake2b(text, digest_size=KEY_BYTES, person=b"oncekeeper-key").digest()


def id_text(task_id: TaskId) -> str:
    """The text form of an id."""
    return str(task_id) if isinstance(task_id, int) else "k" + task_id.hex()


def parse_id(text: str) -> TaskId:
    """The id that ``text`` names; ValueError says what is wrong with it."""
    if text.isascii() and text.isdigit():
        number = int(text)
        if 1 <= number <= RANGE_ID_MAX:
            return number
        raise ValueError(f"id={text!r} must be from 1 to {RANGE_ID_MAX}")
    if len(text) == 1 + 2 * KEY_BYTES and text[0] == "k":
        try:
            return bytes.fromhex(text[1:])
        except ValueError:
            pass
    raise ValueError(f"id={text!r} must be decimal digits, or 'k' and {2 * KEY_BYTES} hexadecimal digits")


def ids_of(task_ids: Iterator[TaskId] | list[TaskId] | tuple[TaskId, ...]) -> Ids:
    """Gather single ids into a batch; consecutive range ids become runs."""
    runs: list[tuple[int, int]] = []
    keys: list[bytes] = []
    for task_id in task_ids:
        if isinstance(task_id, bytes):
            keys.append(task_id)
        elif runs and runs[-1][0] + runs[-1][1] == task_id:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((task_id, 1))
    return Ids(tuple(runs), tuple(keys))
