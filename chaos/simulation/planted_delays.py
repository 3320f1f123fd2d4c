"""Bugs of delayed tasks, planted as in planted.py: in what is handed on to the log's store, and what comes back."""

from __future__ import annotations

import node.coordinator
import node.deferring
import node.delaykeeping
import node.dues
from chaos.simulation.plants import Plant, edit

_deferring = node.deferring.Deferring
_dues = node.dues.Dues

DELAYS = (
    Plant(
        "passed-before-kept",
        "a position passes a delayed task before the store has it durably",
        edit(
            node.delaykeeping.DelayKeeping,
            "write",
            "event = await self._patient.run(lambda log: answer_of_store(store_of(log), effect))",
            "event = m.Deferred(effect.ticket) if is_defer else None\n"
            "    if is_defer:\n"
            "        self._feed(event)\n"
            "        await asyncio.sleep(0.6)\n"
            "    event2 = await self._patient.run(lambda log: answer_of_store(store_of(log), effect))\n"
            "    if is_defer:\n"
            "        return\n"
            "    event = event2",
        ),
    ),
    Plant(
        "dropped-when-fetched",
        "a row is dropped when its task is fetched, and not when the ledger has closed it",
        edit(
            _dues,
            "fetched",
            "self._busy[row] = row.count",
            "self._busy[row] = row.count\n        self._drops.append(Place(row.partition, row.offset, row.count))",
        ),
    ),
    Plant(
        "due-a-second-early",
        "what is due is judged by a clock that is a second ahead",
        edit(
            _dues,
            "look",
            "for row in self._wheel.advance(wall_ms):",
            "wall_ms += 1000\n    for row in self._wheel.advance(wall_ms):",
        ),
    ),
    Plant(
        "never-loaded",
        "a new owner does not load what the former one had handed on",
        edit(_dues, "_loads", "if known.loading or known.rows > s.rows_max // 2:", "if True:"),
    ),
    Plant(
        "settled-and-not-dropped",
        "a task that came from the store moves a position when it is settled, and its row stays",
        edit(node.coordinator.Coordinator, "_settled", "if piece.row is None:", "if True:"),
    ),
    Plant(
        "retry-forgets-its-row",
        "a retry of a delayed task is let go of, and not moved to its time",
        edit(
            _deferring,
            "hand_on",
            "self._to_move.append((piece, -(-due_ms // _MOVE_STEP_MS) * _MOVE_STEP_MS))",
            "self.settled(piece)",
        ),
    ),
    Plant(
        "enqueued-and-lost",
        "a task that takes its turn when due leaves the store, and nobody looks for it in its queue",
        edit(
            _dues,
            "_take",
            "taken.append(row)",
            "taken.append(row) if not way else self._drops.append(\n"
            "            Place(row.partition, row.offset, row.count))",
        ),
    ),
)
