"""The lanes of a node, a pool of workers each, and which handler goes by which (pure)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from node.flow import HandlerFlow, Lane
from node.pieces import Piece
from node.views import CoordinatorSettings
from node.workers.port import HandlerInfo

UNKNOWN_KIND = "?"  # the lane of handlers that no worker knows: claimed, and given to dead letters
UNKNOWN_SLOTS = 64


class Lanes:
    def __init__(self, settings: CoordinatorSettings) -> None:
        self._settings = settings
        self.handlers: Mapping[str, HandlerInfo] = {}
        self._lanes = {UNKNOWN_KIND: self._lane(UNKNOWN_SLOTS)}

    def __iter__(self) -> Iterator[Lane]:
        return iter(self._lanes.values())

    def _lane(self, slots: int) -> Lane:
        s = self._settings
        return Lane(slots, s.horizon_ms, s.rerun_horizon_ms, s.claim_max)

    def know(self, handlers: Mapping[str, HandlerInfo], slots: Mapping[str, int]) -> None:
        self.handlers = handlers
        for kind, count in slots.items():
            lane = self._lanes.get(kind)
            if lane is None:
                self._lanes[kind] = self._lane(count)
            else:
                lane.slots = count

    def info(self, piece: Piece) -> HandlerInfo | None:
        return self.handlers.get(piece.batch.handler)

    def of(self, piece: Piece) -> Lane:
        info = self.info(piece)
        return self._lanes[info.kind if info is not None else UNKNOWN_KIND]

    def flow(self, piece: Piece) -> HandlerFlow:
        return self.of(piece).handler(piece.batch.handler)

    @property
    def ready_tasks(self) -> int:
        return sum(lane.ready_tasks for lane in self)

    def waiting(self) -> list[Piece]:
        return [piece for lane in self for piece in lane.waiting()]
