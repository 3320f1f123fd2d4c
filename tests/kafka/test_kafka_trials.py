"""The demo and the bench on real brokers, as small as they go: whole, right, and never how fast."""

import json
import subprocess
import sys

import pytest

from node.bench.run import ON_KAFKA
from node.cluster import open_cluster
from node.config import ConfigError
from node.kafkaup.broker import Kafka
from node.kafkaup.trial import Trial, check_log, trial_log
from node.supervisor import child_environment
from tests.support.kafka_broker import create_topic, topics

CLI = [sys.executable, "-c", "from node.cli import main; main()"]


def run(*arguments):
    ran = subprocess.run(
        [*CLI, *arguments, "--json"], env=child_environment(), capture_output=True, text=True, timeout=400
    )
    return ran.returncode, json.loads(ran.stdout or "{}"), ran.stderr


@pytest.mark.slow
def test_every_order_takes_effect_once_while_leader_workers_and_broker_are_killed(tmp_path):
    home = tmp_path / "demo"
    code, found, said = run("demo", "--log", "kafka", "--orders", "1000", "--dir", str(home))
    assert code == 0, (found, said)
    assert list(found) == [
        "submitted", "effects", "lost", "twice", "suspects", "failover_ms", "broker_restarts", "wall_s",
    ]  # fmt: skip
    assert (found["submitted"], found["effects"], found["lost"], found["twice"]) == (1000, 1000, 0, 0)
    assert found["broker_restarts"] == 1
    assert open_cluster(home / "cluster").running() == {}
    assert Kafka.open(home / "kafka").running == []


@pytest.mark.slow
def test_the_bench_measures_on_a_broker_that_is_there_and_cleans_up_after_itself(kafka):
    log, groups = f"kafka://{kafka.bootstrap()}", ("submit", "duplicates", "leave")
    only = [word for group in groups for word in ("--only", group)]
    code, found, said = run("bench", "--log", log, "--quick", "--tasks", "1000", *only)
    assert code == 0, (found, said)
    assert [row["group"] for row in found["rows"]] == ["submit", "leave", "leave", "duplicates", "duplicates"]
    assert found["rows"][0]["measured"].endswith("%")
    assert all(value > 0 for value in found["bare"].values())
    assert set(groups) < set(ON_KAFKA)
    assert [topic for topic in topics(kafka.bootstrap()) if topic.startswith("bench")] == []


def test_a_prefix_of_the_trials_own_is_deleted_and_nobody_elses(kafka, prefix, tmp_path):
    create_topic(kafka.bootstrap(), f"{prefix}.mine")
    with trial_log(f"kafka://{kafka.bootstrap()}", tmp_path, prefix) as trial:
        made = trial.url.rpartition("/")[2]
        assert made.startswith(f"{prefix}-")
        create_topic(kafka.bootstrap(), f"{made}-nodes.q.default")
    assert topics(kafka.bootstrap(), prefix) == [f"{prefix}.mine"]
    with trial_log(f"kafka://{kafka.bootstrap()}/{prefix}", tmp_path, "other") as trial:
        assert trial == Trial(f"kafka://{kafka.bootstrap()}/{prefix}")
    assert topics(kafka.bootstrap(), prefix) == [f"{prefix}.mine"]


@pytest.mark.parametrize(
    "log", ["sqlite", "rabbit://x", "kafka://", "kafka://h:99999", "kafka://me:Geheim@h:1"]
)
def test_a_log_that_cannot_be_is_refused_by_its_name(log):
    with pytest.raises(ConfigError, match="log=") as refused:
        check_log(log)
    assert "Geheim" not in str(refused.value)


@pytest.mark.parametrize("command", ["demo", "bench"])
def test_what_no_trial_can_run_on_is_bad_usage(command):
    code, found, _ = run(command, "--log", "kafka://h:99999")
    assert (code, found["field"]) == (2, "log")


def test_a_broker_that_is_not_there_is_told_before_any_node_starts(tmp_path):
    code, found, _ = run("demo", "--log", "kafka://127.0.0.1:1", "--dir", str(tmp_path / "demo"))
    assert code == 1
    assert "127.0.0.1:1" in found["error"]
    assert not (tmp_path / "demo" / "cluster").exists()
