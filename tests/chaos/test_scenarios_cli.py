"""`oncekeeper chaos`: bad input is refused before anything starts, and an interrupted run leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from chaos.faults import Fault, Faults
from chaos.history import History
from chaos.scenarios.catalog import CATALOG, chosen
from node.supervisor import child_environment
from tests.support.ctrl_c import listen_to_ctrl_c

COMMAND = [sys.executable, "-P", "-c", "from node.cli import main; main()", "chaos"]


def chaos(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
    ran = subprocess.run(
        [*COMMAND, *arguments, "--json"],
        cwd=folder,
        env={**child_environment(), **(env or {})},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return ran.returncode, json.loads(ran.stdout)


def test_the_list_names_what_each_scenario_strikes_and_what_must_hold(tmp_path: Path) -> None:
    code, told = chaos(tmp_path, "list")
    assert code == 0
    assert [each["name"] for each in told["scenarios"]] == list(CATALOG)
    assert all(each["strikes"] and each["holds"] for each in told["scenarios"])


def test_the_suite_has_every_fault_of_the_list_that_does_not_need_kafka() -> None:
    wanted = {*range(1, 27), *range(31, 37), 40}
    assert {each.number for each in CATALOG.values()} == wanted
    assert 8 <= len(chosen("smoke")) <= 12


def test_an_unknown_scenario_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    code, told = chaos(tmp_path, "run", "leader-isolate")
    assert code == 2
    assert "leader-isolated" in told["error"]


def test_a_seed_that_is_no_number_is_refused(tmp_path: Path) -> None:
    code, told = chaos(tmp_path, "run", "leader-killed", "--seed", "x")
    assert code == 2
    assert "--seed" in told["error"]


def test_nothing_to_measure_is_refused(tmp_path: Path) -> None:
    for arguments in (("--kills", "0", "--pauses", "0"), ("--kills", "-1")):
        code, told = chaos(tmp_path, "measure", *arguments)
        assert (code, "kills" in told["error"]) == (2, True)


def test_without_toxiproxy_it_says_how_to_get_it(tmp_path: Path) -> None:
    nothing = {"PATH": "/nowhere", "XDG_CACHE_HOME": str(tmp_path), "ONCEKEEPER_TOXIPROXY": ""}
    code, told = chaos(tmp_path, "run", "leader-killed", env=nothing)
    assert code == 2
    assert "tools/get-toxiproxy" in told["error"]
    assert "go install" in told["error"]


@pytest.fixture
def some_toxiproxy(tmp_path: Path) -> dict[str, str]:
    """A program that is never started: what these tests are about is found before."""
    return {"ONCEKEEPER_TOXIPROXY": "/bin/true"}


def test_a_report_directory_that_exists_is_refused(tmp_path: Path, some_toxiproxy: dict[str, str]) -> None:
    (tmp_path / "here").mkdir()
    code, told = chaos(tmp_path, "run", "leader-killed", "--report", "here", env=some_toxiproxy)
    assert code == 2
    assert "here exists already" in told["error"]


APPS = {
    "empty": ("from oncekeeper import App\napp = App('empty')\n", "no tasks"),
    "broken": ("import no_such_module\n", "no_such_module"),
    "greedy": (
        "from oncekeeper import App\napp = App('greedy')\n@app.task\ndef pay(cents: int) -> None: ...\n",
        "--load",
    ),
}


@pytest.mark.parametrize("name", APPS)
def test_an_application_that_cannot_be_run_is_refused(
    tmp_path: Path, name: str, some_toxiproxy: dict[str, str]
) -> None:
    source, said = APPS[name]
    (tmp_path / f"{name}.py").write_text(source)
    code, told = chaos(tmp_path, "run", "leader-killed", "--app", f"{name}:app", env=some_toxiproxy)
    assert code == 2
    assert said in told["error"]


def test_a_load_with_a_bad_line_is_refused_by_its_number(
    tmp_path: Path, some_toxiproxy: dict[str, str]
) -> None:
    (tmp_path / "greedy.py").write_text(APPS["greedy"][0])
    (tmp_path / "load.jsonl").write_text(
        '{"handler": "greedy.pay", "body": {"cents": 1}}\n{"handler": "greedy.buy", "body": {}}\n'
    )
    arguments = ("run", "leader-killed", "--app", "greedy:app", "--load", "load.jsonl")
    code, told = chaos(tmp_path, *arguments, env=some_toxiproxy)
    assert code == 2
    assert "line 2" in told["error"]
    assert "greedy.buy" in told["error"]


def test_a_users_application_is_judged_too(tmp_path: Path) -> None:
    load = tmp_path / "load.jsonl"
    charges = [{"handler": "shop.charge", "body": {"order_id": n, "amount_cents": n}} for n in range(1, 2000)]
    load.write_text("\n".join(json.dumps(each) for each in charges))
    arguments = ("--app", "oncekeeper.examples.shop:app", "--load", str(load), "--report", "report")
    code, told = chaos(tmp_path, "run", "leader-killed", *arguments)
    assert (code, told["runs"][0]["verdict"]) == (0, "holds"), told
    assert (tmp_path / "report" / "report.html").exists()


def test_ctrl_c_heals_every_fault_and_ends_every_process(tmp_path: Path) -> None:
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    run = subprocess.Popen(
        [*COMMAND, "run", "links-slow", "--report", str(tmp_path / "report")],
        env={**child_environment(), "CHAOS_TEST_MARK": mark},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=listen_to_ctrl_c,
    )
    try:
        wait(lambda: len(marked(mark)) >= 5, "the run, Toxiproxy and three nodes are there")
        run.send_signal(signal.SIGINT)
        assert run.wait(60) == 130
        wait(lambda: not marked(mark), "all of them are gone")
    finally:
        run.kill()
        run.wait()


def wait(condition: Any, what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"not within a minute: {what}"
        time.sleep(0.05)


def marked(mark: str) -> list[int]:
    """The processes that were started, by whatever way, with this mark in their environment."""
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        try:
            if f"CHAOS_TEST_MARK={mark}".encode() in (each / "environ").read_bytes():
                found.append(int(each.name))
        except OSError:
            continue  # it ended, or is not ours
    return found


def test_every_healer_runs_though_another_failed_and_the_history_tells_what_stands() -> None:
    history = History()
    faults = Faults(history)
    healed: list[str] = []

    def fail() -> None:
        raise OSError("as told")

    for name, heal in (("first", lambda: healed.append("first")), ("second", fail)):
        faults.strike(Fault(name, (), lambda: None, heal))
    faults.heal_all()
    assert healed == ["first"]
    assert [(each.kind, each.name) for each in history.faults] == [
        ("FAULT", "first"),
        ("FAULT", "second"),
        ("HEAL", "first"),
    ]


def test_a_fault_whose_strike_fails_halfway_is_healed() -> None:
    faults = Faults(History())
    healed: list[str] = []

    def fail() -> None:
        raise OSError("as told")

    with (
        pytest.raises(OSError, match="as told"),
        faults.standing(Fault("half", (), fail, lambda: healed.append("half"))),
    ):
        raise AssertionError("not reached")
    assert healed == ["half"]
