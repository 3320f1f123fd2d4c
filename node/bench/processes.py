"""What processes cost, as the kernel counts it (/proc)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
MB = 1 << 20


@dataclass(frozen=True, slots=True)
class Memory:
    rss: int
    pss: int  # what is shared, counted by its part

    def __add__(self, other: Memory) -> Memory:
        return Memory(self.rss + other.rss, self.pss + other.pss)

    def document(self) -> dict[str, float]:
        return {"rss_mb": round(self.rss / MB, 1), "pss_mb": round(self.pss / MB, 1)}


def cpu_s(pid: int) -> float:
    """User and system time of a process and its threads, those that ended too; in steps of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def memory(pid: int) -> Memory:
    sizes = {"Rss": 0, "Pss": 0}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in sizes:
            sizes[name] = int(rest.split()[0]) << 10
    return Memory(sizes["Rss"], sizes["Pss"])


def children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


def kinds(node_pids: Iterable[int]) -> dict[str, list[int]]:
    """The pids of nodes, of their guards and of their workers."""
    found: dict[str, list[int]] = {"nodes": [], "guards": [], "workers": []}
    for pid in node_pids:
        found["nodes"].append(pid)
        for child in children(pid):
            command = Path(f"/proc/{child}/cmdline").read_bytes()
            found["guards" if b"guard" in command else "workers"].append(child)
    return found


def cpu_by_kind(node_pids: Iterable[int]) -> dict[str, float]:
    used: dict[str, float] = {}
    for kind, pids in kinds(node_pids).items():
        used[kind] = sum(map(cpu_s, pids))
    used["client"] = sum(os.times()[:2])
    return used


def machine() -> dict[str, object]:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "unknown",
    )
    total = int(Path("/proc/meminfo").read_text().split()[1]) << 10
    system = os.uname()
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(total / (1 << 30), 1),
        "kernel": f"{system.sysname} {system.release}",
    }


def load() -> float:
    """Processes that ran or wanted to, mean of the last minute: others than the bench count too."""
    return os.getloadavg()[0]
