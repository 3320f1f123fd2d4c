"""What a measurement is: a row of the table, and the arithmetic over its samples."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """``met``: whether the reach was reached; None where there is none to reach."""

    group: str  # what --only names
    what: str
    reach: str
    measured: str
    met: bool | None = None
    beside: str = ""  # the bare limit that bounds it
    samples: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reaches:
    """What is to be reached on one kind of log, where it is not the same on each."""

    tasks_s: int
    tasks_least_s: int
    start_p50_ms: float
    start_p99_ms: float


EMBEDDED = Reaches(tasks_s=100_000, tasks_least_s=40_000, start_p50_ms=3, start_p99_ms=15)
KAFKA = Reaches(tasks_s=50_000, tasks_least_s=50_000, start_p50_ms=5, start_p99_ms=25)


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of everything, where, and on which log."""

    home: Path
    log: str = "embedded"
    tasks: int = 200_000
    rounds: int = 3
    bulk_tasks: int = 200_000
    pending: int = 1_000_000
    latency_s: float = 5.0
    latency_per_s: int = 200
    commands: int = 800
    kills: int = 20
    rest_s: float = 10.0
    range_ids: int = 1_000_000_000
    keyed_ids: int = 10_000_000
    bare_s: float = 0.5
    duplicates: int = 1_000_000
    leaves: int = 6
    crashes: int = 2

    @property
    def is_kafka(self) -> bool:
        return self.log != "embedded"

    @property
    def reaches(self) -> Reaches:
        return KAFKA if self.is_kafka else EMBEDDED

    def log_of(self, cluster: str) -> dict[str, object]:
        """For ``running_nodes``: of a Kafka, each cluster has a prefix of its own."""
        return {"log": f"{self.log}-{cluster}"} if self.is_kafka else {}


def quick(plan: Plan) -> dict[str, Any]:
    """What a quick run takes less of."""
    return {
        "tasks": min(plan.tasks, 50_000),
        "rounds": 1,
        "bulk_tasks": 100_000,
        "pending": 50_000,
        "latency_s": 2.0,
        "commands": 200,
        "kills": 3,
        "rest_s": 5.0,
        "range_ids": 100_000_000,
        "keyed_ids": 500_000,
        "bare_s": 0.2,
        "duplicates": min(200_000, plan.tasks * 4),
        "leaves": 2,
        "crashes": 1,
    }


def percentile(samples: Sequence[float], part: float) -> float:
    """The sample below which ``part`` of all lie (nearest rank); of none: not a number."""
    ordered = sorted(samples)
    if not ordered:
        return float("nan")
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))]


def median(samples: Sequence[float]) -> float:
    return statistics.median(samples) if samples else float("nan")


def spread(samples: Sequence[float]) -> dict[str, float]:
    return {
        "p50": round(percentile(samples, 0.5), 3),
        "p99": round(percentile(samples, 0.99), 3),
        "max": round(max(samples, default=float("nan")), 3),
    }


def rounded(samples: Sequence[float], digits: int = 3) -> list[float]:
    return [round(sample, digits) for sample in samples]


@contextmanager
def environment(environ: Any, name: str, value: str) -> Iterator[None]:
    former = environ.get(name)
    environ[name] = value
    try:
        yield
    finally:
        if former is None:
            environ.pop(name, None)
        else:
            environ[name] = former
