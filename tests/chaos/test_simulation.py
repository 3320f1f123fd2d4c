"""The simulator: what it runs holds, what it says can be replayed, and a bug that is put in is found.

Bounded to about a minute: `oncekeeper simulate --seeds 2000` and `--plants` are the whole (docs/simulation.md).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from chaos.simulation.cluster import Options, run_seed
from chaos.simulation.planted import BY_NAME, PLANTS
from chaos.simulation.runner import run_one
from node.performing import Performing

ROOT = Path(__file__).resolve().parents[2]
SEEDS = range(1000, 1000 + int(os.environ.get("ONCEKEEPER_TEST_SEEDS", "100")))

SEARCHED = 80

REGRESSIONS = {
    "catching-up-is-enough": ("old leader is back", 0),
    "learner-counts": ("old leader is back", 0),
    "wrong-life-testifies": ("workers hang", 0),
    "failed-node-lingers": ("disk error", 0),
    "damaged-snapshot-opened": ("rotten disk", 0),
    "due-time-looked-at-once": ("wall clock", 0),
    "message-has-the-last-word": ("reschedule is cut short", 0),
}
"""What the simulator found in the product: the plant takes the fix out again, and a run with one fault of this kind
shows it. The seed is the first that does; a change of the code draws other dice, so those that follow are tried
too. What takes many seeds (stale-sweep, dead-is-for-good, old-snapshot-for-ever) is left to --plants."""


def simulate(*arguments: str, hash_seed: str = "0") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from node.cli import main; sys.exit(main())",
            "simulate",
            *arguments,
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def told(seed: int, options: Options | None = None) -> str:
    outcome = run_one(seed, options or Options())
    return "\n".join([f"seed {seed}: {each.what}" for each in outcome.violations] + outcome.history)


def test_clusters_keep_their_promises_under_faults():
    failed = [told(seed) for seed in SEEDS if run_seed(seed).failed]
    assert not failed, "\n\n".join(failed)


@pytest.mark.parametrize("name", sorted(REGRESSIONS))
def test_what_the_simulator_found_once_it_finds_again_without_the_fix(name: str):
    fault, first = REGRESSIONS[name]
    options = Options(fault=fault)
    seeds = range(first, first + SEARCHED)
    shown = next((seed for seed in seeds if run_seed(seed, options, BY_NAME[name].put_in).failed), None)
    assert shown is not None, BY_NAME[name].what
    assert not run_seed(shown, options).violations, told(shown, options)


def test_a_run_without_faults_ends_soon_after_its_last_task():
    report = run_seed(5, Options(faults=False))
    assert not report.violations
    assert report.tasks > 10
    assert report.faults == []


def test_the_same_seed_is_the_same_run_in_another_process_under_another_hash_seed():
    seeds = [3, 41, 95, 159]
    here = [run_seed(seed).digest for seed in seeds]
    script = (
        "from chaos.simulation.cluster import run_seed\n"
        "run_seed(77)\n"  # what ran before must not matter
        f"print(','.join(run_seed(seed).digest for seed in {seeds}))"
    )
    for hash_seed in ("1", "4242"):
        there = subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert there.stdout.strip().split(",") == here


# Those that few seeds are needed for, one of each part; all of them: `oncekeeper simulate --plants`.
SAMPLE = {
    "no-fsync": 60,
    "match-is-taken-back": 60,
    "fence-does-not-grow": 10,
    "retry-delay-ignored": 10,
    "commit-before-settle": 20,
    "due-time-ignored": 20,
    "check-not-asked": 40,
    "dead-before-aside": 40,
    "journal-cut-first": 40,
    "barrier-lies": 60,
    "boot-id-ignored": 60,
    "ruling-without-fence": 60,
    "bloom-is-proof": 60,
}


@pytest.mark.parametrize("name", sorted(SAMPLE))
def test_a_planted_bug_is_found(name: str):
    plant = BY_NAME[name]
    assert any(run_seed(seed, None, plant.put_in).failed for seed in range(SAMPLE[name])), (
        f"{plant.what}: no seed below {SAMPLE[name]} found it"
    )


# Those that need several things one behind the other: a fault that is aimed finds them in a few seeds.
AIMED = {
    "stale-lease": "outlive the lease",
    "kill-is-not-a-kill": "outlive the lease",
    "settle-without-fence": "outlive the lease",
    "lease-from-the-answer": "late answer",
    "testimony-twice": "witness comes back",
    "doubtful-tail-believed": "all disks fail",
    "failed-sync-forgiven": "all disks fail",
    "advance-by-wall-clock": "wall clock",
    "leader-counts-unsynced": "old leader is back",
    "votes-without-journal": "old leader is back",
    "sweeper-drops-first": "kill between log writes",
    "forgotten-before-appended": "firing is cut short",
    "id-of-the-moment": "firing is cut short",
    "fires-again": "firing is cut short",
    "late-is-missed": "all are down",
    "short-not-looked-up": "reschedule is cut short",
    "acknowledged-and-not-moved": "reschedule is cut short",
}


@pytest.mark.parametrize("name", sorted(AIMED))
def test_a_planted_bug_is_found_by_the_fault_that_is_aimed_at_it(name: str):
    plant, options = BY_NAME[name], Options(fault=AIMED[name])
    assert any(run_seed(seed, options, plant.put_in).failed for seed in range(60)), (
        f"{plant.what}: no seed below 60 found it with {AIMED[name]!r}"
    )


def test_schedules_and_reschedules_keep_their_promises_under_the_faults_that_are_aimed_at_them():
    kinds = ("firing is cut short", "all are down", "reschedule is cut short")
    reached: set[str] = set()
    for seed in range(8):
        for kind in kinds:
            report = run_seed(seed, Options(fault=kind))
            assert not report.violations, told(seed, Options(fault=kind))
            reached |= report.reached
    assert {
        "firing: all",
        "firing: latest",
        "firing: none",
        "reschedule moved",
        "reschedule refused",
    } <= reached


@contextlib.contextmanager
def spinning():
    def spin(self: object) -> None:
        while True:
            pass

    before, Performing._tick = Performing._tick, spin
    try:
        yield
    finally:
        Performing._tick = before


def test_a_step_that_never_ends_is_ended_and_told():
    report = run_seed(2, None, spinning)
    assert report.violations[0].what.startswith("something spins")


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_every_planted_bug_still_fits_the_code(plant):
    with plant.put_in():
        pass


def test_there_are_at_least_thirty_planted_bugs_each_with_a_name_of_its_own():
    assert len(PLANTS) >= 30
    assert len(BY_NAME) == len(PLANTS)


def test_a_failure_names_the_invariant_the_history_of_the_id_and_the_command_that_replays_it():
    done = simulate("--seed", "0", "--plant", "fence-does-not-grow")
    assert done.returncode == 1
    assert "invariant 3" in done.stdout
    assert "CLAIMED" in done.stdout
    assert "again: oncekeeper simulate --seed 0 --plant fence-does-not-grow" in done.stdout


def test_a_run_prints_a_line_a_seed_and_one_json_document_when_asked():
    lines = simulate("--seeds", "3", "--jobs", "1")
    assert lines.returncode == 0
    assert [line.split()[:3] for line in lines.stdout.splitlines()] == [
        ["seed", "0", "ok"],
        ["seed", "1", "ok"],
        ["seed", "2", "ok"],
    ]
    document = json.loads(simulate("--seed", "1", "--json").stdout)
    assert document["seeds"] == 1
    assert document["failed"] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--seeds", "many"), "--seeds"),
        (("--seed", "x1"), "--seed"),
        (("--seed", "-1"), "seed=-1 must be from 0"),
        (("--seeds", "-5"), "seeds=-5 must be from 1"),
        (("--nodes", "4"), "nodes=4 must be 3 or 5"),
        (("--jobs", "1000"), "jobs=1000 must be from 0"),
        (("--plant", "no-fsynk"), "did you mean no-fsync?"),
        (("--fault", "paus"), "did you mean pause?"),
        (("--enough", "-1"), "enough=-1 must be from 0"),
        (("--seed", "1", "--only-faults", "a"), "only_faults='a'"),
    ],
)
def test_bad_input_is_bad_usage_with_a_message(arguments: tuple[str, ...], said: str):
    done = simulate(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
