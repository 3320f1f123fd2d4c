"""Steady work: small batches of tasks from a thread, each recorded with what the client was told."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from chaos.faults import now_ns
from chaos.history import History, SubmitFailed
from dedup.ids import Ids
from oncekeeper.client import Client
from oncekeeper.errors import ClusterUnreachable, OncekeeperError, UnknownSubmit

BATCH = 5
PAUSE_S = 0.05


@dataclass(frozen=True)
class Kind:
    """What is submitted: a handler, its policy, and the bodies, in turn."""

    handler: str
    policy: str
    bodies: tuple[bytes, ...] = ()

    def body(self, number: int) -> bytes:
        return self.bodies[number % len(self.bodies)] if self.bodies else json.dumps({"n": number}).encode()


OWN = tuple(
    Kind(f"chaos.{name}", policy)
    for name, policy in (("write", "check"), ("reckon", "check"), ("drift", "check"), ("again", "rerun"))
)


class Load:
    def __init__(self, client: Client, history: History, kinds: Sequence[Kind]) -> None:
        self._client = client
        self._history = history
        self._kinds = kinds
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._number = 0
        self._error: Exception | None = None
        self.slowest_ns = 0
        """The longest that a submit took, whatever came of it."""

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No more is submitted when this returns. Raises what a submit raised that was no answer of ours."""
        self._end.set()
        if self._thread is not None:
            self._thread.join(60)
            self._thread = None
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        turn = 0
        try:
            while not self._end.wait(PAUSE_S):
                self.submit(self._kinds[turn % len(self._kinds)], BATCH)
                turn += 1
        except Exception as error:  # noqa: BLE001  # raised again by stop
            self._error = error

    def submit(self, kind: Kind, count: int = 1, **options: Any) -> Ids:
        """The ids, of which the history knows whether they were acknowledged; none if nothing was stored."""
        bodies = [kind.body(self._number + at) for at in range(count)]
        self._number += count
        at_ns = now_ns()
        try:
            ids = self._send(kind, bodies, at_ns, options)
        except UnknownSubmit as error:
            self._history.submit(cast(Ids, error.ids), kind.policy, acknowledged=False, t_ns=at_ns)
            return Ids()
        except (ClusterUnreachable, OncekeeperError) as error:
            self._history.refused.append(SubmitFailed(at_ns, str(error)))
            return Ids()
        self._history.submit(ids, kind.policy, t_ns=at_ns)
        return ids

    def _send(self, kind: Kind, bodies: list[bytes], at_ns: int, options: dict[str, Any]) -> Ids:
        try:
            return self._client.send(kind.handler, bodies, **options)
        finally:
            self.slowest_ns = max(self.slowest_ns, now_ns() - at_ns)
