"""The report of what no seed reaches names the branches that were not taken, and no others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from chaos.simulation.reached import SIMULATED, tell

ROOT = Path(__file__).resolve().parents[2]


def test_the_patterns_name_files_that_are_there() -> None:
    assert [pattern for pattern in SIMULATED if not list(ROOT.glob(pattern))] == []


def test_a_branch_that_was_not_taken_is_shown_with_its_lines(tmp_path: Path) -> None:
    lines = (ROOT / "node" / "offsets.py").read_text("utf-8").splitlines()
    at = next(number for number, line in enumerate(lines, 1) if line.strip() == "if end <= self.position:")
    found = {
        "totals": {"covered_branches": 3, "num_branches": 4, "covered_lines": 8, "num_statements": 9},
        "files": {
            "node/offsets.py": {
                "summary": {
                    "covered_lines": 8,
                    "num_statements": 9,
                    "covered_branches": 3,
                    "num_branches": 4,
                },
                "missing_branches": [[at, at + 1]],
                "missing_lines": [at + 1, at + 5, at + 6],
            }
        },
    }
    report = tell(found, 7, 1.0)
    assert "| node/offsets.py | 8 of 9 (89 %) | 3 of 4 (75 %) | 1 |" in report
    assert f"- {at}: `if end <= self.position:` never goes on at {at + 1}: `return False`" in report
    assert f"- lines never run: {at + 5}-{at + 6}" in report


def test_a_run_writes_the_report(tmp_path: Path) -> None:
    file = tmp_path / "new" / "reached.md"
    command = [sys.executable, "-m", "chaos.simulation.reached", "--seeds", "1", "--report", str(file)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stderr
    text = file.read_text("utf-8")
    assert "| node/coordinator.py |" in text
    assert "## raft/engine.py" in text
