"""The bench on real nodes, as small as it goes: whole, and of the shape that programs read. Never how fast."""

import json
import subprocess
import sys

import pytest

from node.bench.app import NUMBER, find_effect
from node.bench.memory import measure
from node.bench.run import GROUPS
from node.supervisor import child_environment

BENCH = [sys.executable, "-c", "from node.cli import main; main()", "bench"]


def bench(*arguments):
    ran = subprocess.run(
        [*BENCH, *arguments], env=child_environment(), capture_output=True, text=True, timeout=250
    )
    return ran.returncode, ran.stdout, ran.stderr


@pytest.mark.slow
def test_tasks_are_counted_and_every_figure_has_its_samples(tmp_path):
    code, out, said = bench("--quick", "--tasks", "2000", "--only", "tasks", "--only", "submit", "--json",
                            "--dir", str(tmp_path))  # fmt: skip
    assert code == 0, said
    found = json.loads(out)
    assert set(found) == {"format", "machine", "load", "plan", "bare", "rows", "wall_s"}
    assert [row["group"] for row in found["rows"]] == ["submit", "tasks", "tasks", "tasks", "tasks"]
    assert all(
        set(row) == {"group", "what", "reach", "measured", "met", "beside", "samples"}
        for row in found["rows"]
    )
    assert all(value > 0 for value in found["bare"].values())
    for row, tasks in zip(found["rows"][1:], (2000, 2000, 1000, 1000), strict=True):
        (only,) = row["samples"]["rounds"]
        assert only["tasks"] == tasks
        assert set(only["cpu_us_a_task"]) == {"client", "nodes", "workers"}
    (kept,) = tmp_path.iterdir()
    # 200 to warm up, and the rounds: outside of the system stands each number once.
    numbers = (kept / "effects").read_bytes()
    assert sorted(number for (number,) in NUMBER.iter_unpack(numbers)) == list(range(200 + 6000))


@pytest.mark.slow
def test_latency_rest_and_commands_are_of_all_that_was_asked(tmp_path):
    code, out, said = bench("--quick", "--only", "latency", "--only", "rest", "--only", "command", "--json")
    assert code == 0, said
    found = json.loads(out)
    assert [row["group"] for row in found["rows"]] == ["latency"] * 2 + ["rest"] * 2 + ["command"] * 2
    plan = found["plan"]
    assert len(found["rows"][0]["samples"]["ms"]) == plan["latency_s"] * plan["latency_per_s"]
    assert sorted(found["rows"][2]["samples"]) == ["n1", "n2", "n3"]
    assert len(found["rows"][4]["samples"]["ms"]) == plan["commands"]


def test_after_each_kill_of_a_leader_a_claim_and_a_command_are_seen(tmp_path):
    code, out, said = bench("--quick", "--only", "failover", "--json")
    assert code == 0, said
    found = json.loads(out)
    claims, command = (row["samples"]["s"] for row in found["rows"])
    assert len(claims) == len(command) == found["plan"]["kills"]
    assert all(seconds > 0 for seconds in claims + command)


@pytest.mark.parametrize("kind", ["ranges", "keyed"])
def test_the_executed_set_is_filled_and_looked_up(kind):
    found = measure(kind, 60_000)
    # Of the range ids one in 50,000 stays open.
    assert found["ids"] == {"ranges": 59_999, "keyed": 60_000}[kind]
    assert all(len(ms) == 300 for ms in found["lookup_ms"].values())


def test_a_group_that_does_not_exist_is_refused_by_name():
    code, out, _ = bench("--only", "speed", "--json")
    assert code == 2
    assert json.loads(out)["error"] == f"only=speed is none of {', '.join(GROUPS)}"


def test_the_check_finds_records_only_where_a_record_can_begin(tmp_path):
    path = tmp_path / "effects"
    assert not find_effect(path, 1)
    path.write_bytes(NUMBER.pack(1 << 8) + NUMBER.pack(2))
    assert [find_effect(path, number) for number in (1 << 8, 2, 1, 3)] == [True, True, False, False]
