"""The few places where the node's code reaches for a real clock, process or file by the name of a module."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import dedup.keyed
import node.crashpoint
import node.deferring
import node.http.delays
import node.http.schedules
import node.http.steer
import node.rescheduling
import node.schedules
import node.workers.crew
import node.workers.pools
import node.workers.slot
import raft.engine_library
from chaos.simulation.loop import Killed, current
from chaos.simulation.timetables import BACKLOG_MAX
from chaos.simulation.workers import MachineTime, SimulatedCrew, SimulatedGuard, WorkerProcess
from dedup.bloom import BloomFilter
from node.service import Service

HAND_ON_MS = (2000, 100)


class CrudeFilter(BloomFilter):
    def __init__(self, capacity: int, error_rate: float) -> None:
        super().__init__(capacity, max(error_rate, 0.3))


class _KillHere:
    """Stands in for the module ``os`` in node/crashpoint.py: the death is that of the simulated process."""

    @staticmethod
    def getpid() -> int:
        return 0

    @staticmethod
    def kill(pid: int, number: int) -> None:
        current.loop.on_killed()
        raise Killed


_service_fatal = Service._fatal


def _fatal(service: Service, error: BaseException) -> None:
    """What stops a node is noted; then it goes its way."""
    process = current.loop.process
    process.world.node_failed(process, error)
    _service_fatal(service, error)


def _library_clock() -> float:
    """Where the library reads its clock outside of the engine's calls."""
    return float(current.loop.time())


@contextlib.contextmanager
def seams() -> Iterator[None]:
    """Stand-ins for as long as a run takes."""
    places: list[tuple[Any, str, Any]] = [
        (node.workers.pools, "time", MachineTime),
        (node.workers.pools, "Crew", SimulatedCrew),
        (node.workers.crew, "time", MachineTime),
        (node.workers.crew, "WorkerProcess", WorkerProcess),
        (node.workers.crew, "GuardLink", SimulatedGuard),
        (node.workers.slot, "time", MachineTime),
        (node.crashpoint, "os", _KillHere),
        (node.http.steer, "time", MachineTime),
        (node.http.schedules, "time", MachineTime),
        # As the sessions of a run are to those of a user: shorter by as much.
        (node.rescheduling, "HOLD_MS", 2_500),
        (node.rescheduling, "TELL_S", 3.4),
        (node.http.delays, "time", MachineTime),
        (node.http.delays, "ASK_PEER_MS", 700),
        (node.schedules, "BACKLOG_MAX", BACKLOG_MAX),
        (Service, "_fatal", _fatal),
        (raft.engine_library, "_clock", _library_clock),
        # So small and so full that it is often wrong, which is what must not matter.
        (dedup.keyed, "FILTER_KEYS_MIN", 8),
        (dedup.keyed, "BloomFilter", CrudeFilter),
    ]
    before = [(place, name, getattr(place, name)) for place, name, _ in places]
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    for place, name, stand_in in places:
        setattr(place, name, stand_in)
    try:
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)
        logging.disable(level)


@contextlib.contextmanager
def kept_from(seed: int) -> Iterator[None]:
    """From which delay on tasks go to the log's store: short ones in some runs, in some of these retries too."""
    deferring = node.deferring
    before = deferring.HAND_ON_MS, deferring.RETRY_HAND_ON_MS
    deferring.HAND_ON_MS = HAND_ON_MS[seed % len(HAND_ON_MS)]
    if seed % 4 == 3:
        deferring.RETRY_HAND_ON_MS = deferring.HAND_ON_MS
    try:
        yield
    finally:
        deferring.HAND_ON_MS, deferring.RETRY_HAND_ON_MS = before
