"""The executed set at its full size, in a process of its own whose memory is nothing else.

Run as ``python -m node.bench.memory ranges|keyed COUNT``; prints one JSON document.
"""

from __future__ import annotations

import gc
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from dedup.executed import ExecutedSet
from dedup.ids import Ids
from node.bench.measure import Plan, Row, percentile, rounded
from node.bench.processes import MB, Memory, memory
from node.cli.output import CliError
from node.supervisor import child_environment

BATCH = 1_000
LOOKUPS = 300
HOLE_EACH = 50_000  # of the range ids one in so many is still open: the set never is one long interval
LOOKUP_MS = 1.0
MB_MAX = {"ranges": 64, "keyed": 250}
KEYED_DAY_MS = 24 * 3600 * 1000


def fill_ranges(executed: ExecutedSet, count: int) -> None:
    """Runs end out of order, as batches of several nodes do, and leave holes behind."""
    chance = random.Random(1)
    window: list[tuple[int, int]] = []
    for start in range(1, count + 1, HOLE_EACH):
        at, end = start, min(start + HOLE_EACH - 1, count + 1)  # the last id of each stretch stays open
        while at < end:
            length = min(end - at, 10_000)
            window.append((at, length))
            at += length
        if len(window) > 200:
            chance.shuffle(window)
            while len(window) > 100:
                executed.add(Ids((window.pop(),)), 0)
    for run in window:
        executed.add(Ids((run,)), 0)


def keys(number: int, chance: random.Random, count: int) -> Iterator[bytes]:
    """Random as digests are, and the same ones again for the same number."""
    chance.seed(number)
    blob = chance.randbytes(16 * count)
    return (blob[at : at + 16] for at in range(0, len(blob), 16))


def fill_keyed(executed: ExecutedSet, count: int) -> None:
    """Over twelve days of ledger time, so that several generations live."""
    chance = random.Random()
    for at in range(0, count, BATCH):
        executed.add(
            Ids((), tuple(keys(at, chance, min(BATCH, count - at)))), 12 * KEYED_DAY_MS * at // count
        )


def lookup_ms(executed: ExecutedSet, batch: Callable[[], Ids]) -> list[float]:
    found = []
    for _ in range(LOOKUPS):
        ids = batch()
        began = time.perf_counter()
        executed.spans(ids)
        found.append((time.perf_counter() - began) * 1000)
    return found


def measure(kind: str, count: int) -> dict[str, Any]:
    chance = random.Random(2)
    gc.collect()
    empty = memory(os.getpid())
    executed = ExecutedSet(seed=1)
    began = time.perf_counter()
    (fill_ranges if kind == "ranges" else fill_keyed)(executed, count)
    filled_s = time.perf_counter() - began
    gc.collect()
    full = memory(os.getpid())
    lookups: dict[str, list[float]] = {}
    if kind == "ranges":

        def scattered() -> Ids:
            return Ids(tuple((chance.randrange(1, count), 1) for _ in range(BATCH)))

        def together() -> Ids:
            return Ids(((chance.randrange(1, max(2, count - BATCH)), BATCH),))

        lookups = {"one run": lookup_ms(executed, together), "scattered": lookup_ms(executed, scattered)}
    else:
        other = random.Random()

        def known() -> Ids:
            return Ids((), tuple(keys(chance.randrange(0, count, BATCH), other, BATCH)))

        def unknown() -> Ids:
            return Ids((), tuple(keys(-1 - chance.randrange(1 << 40), other, BATCH)))

        lookups = {"known": lookup_ms(executed, known), "new": lookup_ms(executed, unknown)}
    return {
        "ids": executed.count,
        "empty_mb": Memory.document(empty),
        "full_mb": Memory.document(full),
        "grown_mb": round((full.rss - empty.rss) / MB, 1),
        "fill_s": round(filled_s, 1),
        "lookup_ms": {name: rounded(ms) for name, ms in lookups.items()},
    }


def executed_set(plan: Plan) -> list[Row]:
    return [_row("ranges", "range", plan.range_ids), _row("keyed", "keyed", plan.keyed_ids)]


def _row(kind: str, word: str, count: int) -> Row:
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "node.bench.memory", kind, str(count)],
        stdout=subprocess.PIPE,
        env=child_environment(),
        check=False,
    )
    if ran.returncode:
        raise CliError(f"the executed set of {count:,} {word} ids could not be measured: {ran.returncode}")
    found = json.loads(ran.stdout)
    times = {name: percentile(ms, 0.5) for name, ms in found["lookup_ms"].items()}
    shown = ", ".join(f"{name} {ms:.2f} ms" for name, ms in times.items())
    return Row(
        "memory",
        f"{found['ids']:,} executed {word} ids; a batch of {BATCH:,} looked up",
        f"≤ {MB_MAX[kind]} MB; ≤ {LOOKUP_MS:g} ms",
        f"{found['grown_mb']:.1f} MB; {shown} (p50)",
        found["grown_mb"] <= MB_MAX[kind] and max(times.values()) <= LOOKUP_MS,
        "",
        found,
    )


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
