"""What of the simulated code the seeds reach: ``python -m chaos.simulation.reached --seeds 300 --report FILE``.

The simulation drives the very code of a node, so a branch that no seed takes is either one that needs a world which
the simulator cannot make yet, or one that nobody needs. The nightly run lists them; coverage.py measures them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SIMULATED = (
    "dedup/*.py",
    "raft/ledger*.py",
    "raft/engine*.py",
    "raft/journal*.py",
    "raft/replica.py",
    "raft/store.py",
    "raft/snapshots.py",
    "raft/proposals.py",
    "raft/codec.py",
    "node/coordinator.py",
    "node/asides.py",
    "node/deferring.py",
    "node/hands.py",
    "node/lanes.py",
    "node/tickets.py",
    "node/working.py",
    "node/partitions.py",
    "node/pieces.py",
    "node/offsets.py",
    "node/flow.py",
    "node/doubt.py",
    "node/settling.py",
    "node/undecodable.py",
    "node/dues.py",
    "node/schedules.py",
    "node/wheel.py",
    "node/service.py",
    "node/performing.py",
    "node/reading.py",
    "node/committing.py",
    "node/assigning.py",
    "node/delaykeeping.py",
    "node/rescheduling.py",
    "node/sweeping.py",
    "node/testifying.py",
    "node/session.py",
    "node/lease.py",
    "node/proposer.py",
    "node/sweeper.py",
    "node/testify.py",
    "node/ownership.py",
    "node/workers/journal.py",
    "node/workers/testimony.py",
)


def measure(seeds: Iterable[int]) -> dict[str, Any]:
    """coverage.py's JSON report of the simulated modules after these seeds, all in this process."""
    import coverage

    measuring = coverage.Coverage(
        branch=True, data_file=None, include=[str(ROOT / each) for each in SIMULATED]
    )
    measuring.start()
    # Not before: what a module does when it is imported counts too.
    from chaos.simulation.cluster import Options
    from chaos.simulation.runner import run_one

    failed = [seed for seed in seeds if run_one(seed, Options(), shrink=False).failed]
    measuring.stop()
    with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
        measuring.json_report(outfile=file.name)
        found: dict[str, Any] = json.loads(Path(file.name).read_text("utf-8"))
    found["failed_seeds"] = failed
    return found


def tell(found: dict[str, Any], seeds: int, wall_s: float) -> str:
    """The report, as Markdown: a table of the modules, then each branch and line that was not reached."""
    totals = found["totals"]
    lines = [
        "# What the simulation reaches",
        "",
        f"{seeds:,} seeds in {wall_s:.0f} s (measured, which slows them): {totals['covered_branches']:,} of "
        f"{totals['num_branches']:,} branches and {totals['covered_lines']:,} of {totals['num_statements']:,} "
        "statements of the simulated modules.",
        "",
        "| module | statements | branches | not reached |",
        "|---|---|---|---|",
    ]
    details: list[str] = []
    for name, file in sorted(found["files"].items()):
        path = Path(name) if Path(name).is_absolute() else ROOT / name
        shown = str(path.relative_to(ROOT))
        summary = file["summary"]
        missing = file["missing_branches"]
        lines.append(
            f"| {shown} | {_share(summary['covered_lines'], summary['num_statements'])} "
            f"| {_share(summary['covered_branches'], summary['num_branches'])} | {len(missing)} |"
        )
        if missing or file["missing_lines"]:
            details += ["", f"## {shown}", ""]
            source = path.read_text("utf-8").splitlines()
            details += [_branch(source, start, end) for start, end in missing]
            explained = {start for start, _ in missing} | {abs(end) for _, end in missing}
            rest = [line for line in file["missing_lines"] if line not in explained]
            if rest:
                details.append(f"- lines never run: {_ranges(rest)}")
    return "\n".join(lines + details) + "\n"


def _share(covered: int, of: int) -> str:
    return f"{covered} of {of} ({100 * covered / of:.0f} %)" if of else "-"


def _branch(source: list[str], start: int, end: int) -> str:
    where = "leaves the function" if end < 0 else f"goes on at {end}: `{source[end - 1].strip()}`"
    return f"- {start}: `{source[start - 1].strip()}` never {where}"


def _ranges(numbers: list[int]) -> str:
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)


def main() -> int:
    parser = argparse.ArgumentParser(description="List what of the simulated code no seed reaches.")
    parser.add_argument("--seeds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--report", type=Path, required=True, help="the Markdown file to write")
    given = parser.parse_args()
    if given.seeds < 1:
        parser.error(f"--seeds {given.seeds} must be 1 or more")
    began = time.monotonic()
    found = measure(range(given.seed, given.seed + given.seeds))
    report = tell(found, given.seeds, time.monotonic() - began)
    given.report.parent.mkdir(parents=True, exist_ok=True)
    given.report.write_text(report, "utf-8")
    totals = found["totals"]
    print(
        f"{given.report}: {totals['covered_branches']:,} of {totals['num_branches']:,} branches reached "
        f"by {given.seeds:,} seeds; failed: {found['failed_seeds'] or 'none'}"
    )
    return 1 if found["failed_seeds"] else 0


if __name__ == "__main__":
    sys.exit(main())
