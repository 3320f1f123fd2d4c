"""The second example, as its README tells a user to run it, on a draw of the standard library."""

import json
import subprocess
import sys
from pathlib import Path

from node.supervisor import child_environment

RUN = Path(__file__).resolve().parents[2] / "examples" / "indexer" / "run.py"
FILES = 250


def test_the_index_equals_the_serial_loop_while_a_follower_and_the_leader_are_killed():
    ran = subprocess.run(
        [sys.executable, str(RUN), "--files", str(FILES), "--json"],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    verdict = json.loads(ran.stdout)
    del verdict["wall_s"]
    assert verdict == {
        "files": FILES,
        "rows": FILES,
        "lost": 0,
        "twice": 0,
        "differ": 0,
        "suspects": 0,
        "dead": 0,
        "equal": True,
    }


def test_a_directory_that_is_in_use_is_refused_before_anything_is_started(tmp_path):
    (tmp_path / "something").touch()
    ran = subprocess.run(
        [sys.executable, str(RUN), "--dir", str(tmp_path)],
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert "must be new or empty" in ran.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["something"]
