"""The task message: what stands in the log, and what travels to a node.

One task is the documented JSON object (``task.schema.json``). Tasks that share everything but id and body
travel and rest as one ``TaskBatch``; its JSON is the same object with ``bodies`` in place of ``body``, and
``count`` (range ids from ``id`` on) or ``ids`` (keyed ids).
"""

from __future__ import annotations

import msgspec

from dedup.ids import Ids

BODY_BYTES_MAX = 256 * 1024
MESSAGE_VERSION = 1


class TaskBatch(msgspec.Struct, frozen=True, kw_only=True):
    """Some tasks of one handler and one queue with the same options. ``bodies`` runs parallel to ``ids``."""

    queue: str
    handler: str
    ids: Ids  # either one run, or keys only
    bodies: tuple[bytes, ...]  # each one a JSON text (an object)
    ttr_ms: int = 0  # 0: the handler's own
    due_ms: int = 0  # epoch; 0: at once
    attempt: int = 1
    keys: tuple[str, ...] = ()  # the user's idempotency keys, parallel to ids.keys; () for range ids
    traceparent: str = ""
    submitted_ms: int = 0  # epoch
    submitted_by: str = ""  # "host:pid program", for people

    def __len__(self) -> int:
        return len(self.bodies)
