"""A state machine for tests: it remembers every payload in order, and can be told to fail."""

from __future__ import annotations

import msgspec


class TallyMachine:
    """Counts how often each payload was applied. ``apply`` returns the count of payloads so far."""

    def __init__(self) -> None:
        self.counts: dict[bytes, int] = {}
        self.applied = 0
        self.fail_on: bytes | None = None

    def apply(self, index: int, payload: bytes) -> int:
        if payload == self.fail_on:
            raise RuntimeError("told to fail")
        self.applied += 1
        self.counts[payload] = self.counts.get(payload, 0) + 1
        return self.applied

    def snapshot(self) -> bytes:
        return msgspec.msgpack.encode([self.applied, sorted(self.counts.items())])

    def restore(self, state: bytes) -> None:
        self.applied, items = msgspec.msgpack.decode(state, type=tuple[int, list[tuple[bytes, int]]])
        self.counts = dict(items)
