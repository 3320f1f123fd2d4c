"""A schedule that is put by hand, and what came of it.

Effects are counted from outside (tests/support/real_sink.py), and told apart by the firing's id, which follows from
(schedule, time) alone: so each one says for which time it was.
"""

from __future__ import annotations

import time
from collections import Counter
from datetime import datetime
from typing import Any

from dedup.ids import id_text, parse_id
from node.schedules import firing_id
from tests.support.real_cluster import RealCluster, eventually
from tests.support.stamps import boot_ns

EVERY_MS = 200


def wall_ms() -> int:
    return time.time_ns() // 1_000_000


class Watched:
    def __init__(
        self,
        cluster: RealCluster,
        name: str,
        catch_up: str,
        every_ms: int = EVERY_MS,
        *,
        handler: str = "real.once",
        ahead_ms: int = 0,
    ) -> None:
        """``ahead_ms``: how far any node's clock is ever ahead of ours, or behind."""
        self.cluster, self.name, self.every_ms, self.ahead_ms = cluster, name, every_ms, ahead_ms
        self.earliest_ms = (wall_ms() - ahead_ms) // every_ms * every_ms
        wanted = {"schedule": f"every {every_ms}ms", "handler": handler, "body": {"name": name}}
        self._wanted = {**wanted, "catch_up": catch_up}
        self.put()

    def put(self) -> None:
        self.put_ns = boot_ns()
        shown = self.cluster.api().put(f"/v1/schedules/{self.name}", self._wanted)
        self.first_ms = round(datetime.fromisoformat(shown["next"]).timestamp() * 1000)
        """The first time that it owes."""

    def delete(self) -> None:
        self.cluster.api().ask("DELETE", f"/v1/schedules/{self.name}")

    def times(self) -> dict[str, int]:
        """By the id of its task as text, every time at which it may have fired by now."""
        until_ms = wall_ms() + self.ahead_ms + self.every_ms
        return {
            id_text(firing_id(self.name, at_ms)): at_ms
            for at_ms in range(self.earliest_ms, until_ms, self.every_ms)
        }

    def effects(self) -> Counter[int]:
        """How often each of its times took effect, by what is in the sink."""
        known = self.times()
        return Counter(known[name] for name, _, _ in self.cluster.sink.read() if name in known)

    def fired_between(self, from_ms: int, until_ms: int) -> int:
        """How many of the times between these took effect."""
        return sum(from_ms < at_ms <= until_ms for at_ms in self.effects())

    def wait_for(self, more: int, seconds: float = 60) -> None:
        wanted = len(self.effects()) + more
        eventually(f"{wanted} firings of {self.name}", lambda: len(self.effects()) >= wanted, seconds)

    def end(self) -> dict[str, Any]:
        """Pause it, and wait until all that was decided is done: what is to be said of it."""
        self.cluster.api().post(f"/v1/schedules/{self.name}/pause")

        def done() -> dict[str, Any] | None:
            shown: dict[str, Any] = self.cluster.api().get(f"/v1/schedules/{self.name}")
            return shown if sum(self.effects().values()) >= shown["fired"] else None

        return eventually(f"all that {self.name} fired took effect", done, 60)

    def tell_history(self) -> None:
        """For checkers of the whole history, where there are others: what fired was submitted."""
        known = {at_ms: parse_id(name) for name, at_ms in self.times().items()}
        self.cluster.history.submit((known[at_ms] for at_ms in self.effects()), "check")
