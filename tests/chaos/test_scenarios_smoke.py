"""Real nodes, real faults: the smoke set of the fault suite, each run judged by every invariant.

What a run takes is told in its report and asserted nowhere: bounds in time are figures; no test depends on speed.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from chaos import lines
from chaos.checkers import judge
from chaos.scenarios.catalog import chosen
from chaos.scenarios.run import Plan, Scenario, play

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session", autouse=True)
def toxiproxy() -> None:
    """These tests prove something, so a machine that cannot run them must say so and not pass."""
    found = subprocess.run([ROOT / "tools" / "get-toxiproxy"], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("scenario", chosen("smoke"), ids=lambda each: each.name)
def test_every_invariant_holds_though(scenario: Scenario, tmp_path: Path) -> None:
    run = play(scenario, Plan(seed=1), tmp_path / "report")
    assert run.is_right, (run.wrong, [each for each in run.found if each.wrong])
    assert len(run.history.effects) >= 60
    # What was written down is the whole of it: judged again from the file, by whomever, it is found the same.
    again = judge(lines.read(tmp_path / "report" / "history.jsonl"))
    assert [each.wrong for each in again] == [each.wrong for each in run.found]
    page = (tmp_path / "report" / "report.html").read_text()
    assert scenario.name in page
    assert "http://" not in page
    assert "https://" not in page
