"""Equal entries give equal states in every process: nothing depends on the order of a hash table."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Text hashes differ between the processes, and with them the order of every set and the layout of every dict.
PROGRAM = """
from tests.support.ledger_model import history
for seed in range(6):
    print(seed, history(seed))
"""


def digests(hash_seed: str) -> str:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_processes_with_other_hash_seeds_reach_the_same_digests_and_tell_the_same_events() -> None:
    first = digests("1")
    assert first.count("\n") == 6
    assert digests("2") == first
