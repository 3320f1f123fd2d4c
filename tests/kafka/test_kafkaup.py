"""Brokers for trying out: what they hold survives, three of them survive a loss, and what is wrong is said."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from confluent_kafka import KafkaException

from chaos.toxiproxy import DOWN
from node.cluster import free_ports
from node.kafkaup.broker import Kafka
from node.kafkaup.fetch import NEEDED, VARIABLES, NoKafka, cache_path, find_jars, find_java
from node.kafkaup.layout import FILE, PLAIN, SASL, SASL_TLS, TLS, KafkaError
from node.supervisor import child_environment
from tests.support.cli_shop import command, oncekeeper, until
from tests.support.ctrl_c import listen_to_ctrl_c
from tests.support.kafka_broker import admin, create_topic, produce, started, stored, tls_files, topics
from tests.support.real_cluster import eventually

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path):
    yield tmp_path
    for file in tmp_path.glob(f"*/{FILE}"):
        with contextlib.suppress(KafkaError):  # a test wrote nonsense into it
            Kafka.open(file.parent).kill()


def values(bootstrap, topic):
    return [message.value() for message in stored(bootstrap, topic)]


def shows_all(kafka, wanted):
    """A new leader shows what was acknowledged once its followers have told it how far they are (KIP-207)."""
    eventually("leaders show it", lambda: sorted(values(kafka.bootstrap(), "kept")) == sorted(wanted))


# --- what a user does -----------------------------------------------------------------------------


@pytest.mark.slow
def test_what_was_produced_is_there_after_down_and_up_on_another_port_too(folder):
    up = oncekeeper(folder, "kafka", "up", "--detach", "--port", "0")
    assert up["dir"] == str(folder / "oncekeeper-kafka")
    assert up["url"] == f"kafka://{up['bootstrap']}"
    assert [each["answers"] for each in up["brokers"]] == [True]
    create_topic(up["bootstrap"], "kept", partitions=2)
    produce(up["bootstrap"], "kept", [b"a", b"b", b"c"], partition=0)
    refused = oncekeeper(folder, "kafka", "up", "--detach", expect=1)["error"]
    assert f"up already (broker 1 is process {up['brokers'][0]['pid']})" in refused
    down = oncekeeper(folder, "kafka", "down")
    assert down == {"dir": up["dir"], "stopped": [1], "killed": []}
    assert oncekeeper(folder, "kafka", "down")["stopped"] == []
    status = oncekeeper(folder, "kafka", "status", expect=3)
    assert [(each["pid"], each["answers"]) for each in status["brokers"]] == [(None, False)]
    again = oncekeeper(folder, "kafka", "up", "--detach")
    assert again["bootstrap"] == up["bootstrap"]
    assert oncekeeper(folder, "kafka", "status")["brokers"][0]["pid"] == again["brokers"][0]["pid"]
    assert values(again["bootstrap"], "kept") == [b"a", b"b", b"c"]
    oncekeeper(folder, "kafka", "down")
    (port,) = free_ports(1)
    moved = oncekeeper(folder, "kafka", "up", "--detach", "--port", str(port))
    assert moved["bootstrap"] == f"127.0.0.1:{port}"
    assert values(moved["bootstrap"], "kept") == [b"a", b"b", b"c"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_in_the_foreground_a_signal_stops_the_broker(folder, number):
    with in_foreground(folder) as (process, up):
        kafka = Kafka.open(Path(up["dir"]))
        assert kafka.brokers[1].pid == up["brokers"][0]["pid"]
        process.send_signal(number)
        assert process.wait(60) == 0
        assert kafka.running == []


def test_in_the_foreground_a_broker_dies_with_the_command_however_that_ends(folder):
    with in_foreground(folder) as (process, up):
        process.kill()
        process.wait(60)
        until(lambda: Kafka.open(Path(up["dir"])).running == [], "the broker is gone")


def test_in_the_foreground_the_end_of_the_broker_is_the_end_of_the_command(folder):
    with in_foreground(folder) as (process, up):
        Kafka.open(Path(up["dir"])).brokers[1].kill()
        assert process.wait(60) == 1
        assert "broker 1 ended with -9" in json.loads(process.stdout.read())["error"]


def test_down_ends_a_command_in_the_foreground_in_peace(folder):
    with in_foreground(folder) as (process, _):
        assert oncekeeper(folder, "kafka", "down")["stopped"] == [1]
        assert process.wait(60) == 0


class in_foreground:
    def __init__(self, folder):
        self.process = subprocess.Popen(
            command("kafka", "up", "--port", "0", "--json"),
            cwd=folder,
            env=child_environment(),
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=listen_to_ctrl_c,
        )

    def __enter__(self):
        line = self.process.stdout.readline()
        assert line, "it ended before it was up"
        return self.process, json.loads(line)

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def test_of_two_who_start_the_same_brokers_one_does(folder):
    Kafka.create(folder / "kafka")
    both = [
        subprocess.Popen(
            command("kafka", "up", "--dir", "kafka", "--detach", "--json"),
            cwd=folder, env=child_environment(), stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    told = [json.loads(each.communicate(timeout=120)[0]) for each in both]
    assert sorted(each.returncode for each in both) == [0, 1]
    (refused,) = (each["error"] for each in told if "error" in each)
    assert "running already" in refused or "up already" in refused
    assert [
        each["answers"] for each in oncekeeper(folder, "kafka", "status", "--dir", "kafka")["brokers"]
    ] == [True]


# --- deaths ---------------------------------------------------------------------------------------


def test_an_acknowledged_message_survives_a_kill_and_a_restart_and_a_pause(private_kafka):
    kafka = private_kafka()
    create_topic(kafka.bootstrap(), "kept")
    sent = [b"%d" % number for number in range(1000)]
    produce(kafka.bootstrap(), "kept", sent)
    broker = kafka.brokers[1]
    former = broker.pid
    broker.kill()
    assert (broker.up, broker.pid, broker.alive()) == (False, 0, set())
    broker.start()
    assert broker.pid not in (0, former)
    broker.signal(signal.SIGSTOP)
    until(lambda: broker.alive() == set(), "it is silent")
    assert broker.up
    broker.signal(signal.SIGCONT)
    broker.wait_ready({1})
    assert values(kafka.bootstrap(), "kept") == sent


@pytest.mark.slow
def test_three_brokers_with_every_message_three_times_survive_the_loss_of_one(private_kafka):
    kafka = private_kafka(brokers=3)
    assert [broker.alive() for broker in kafka.brokers.values()] == [{1, 2, 3}] * 3
    create_topic(kafka.bootstrap(), "kept", partitions=3)
    found = admin(kafka.bootstrap()).list_topics("kept").topics["kept"].partitions
    assert [sorted(each.replicas) for each in found.values()] == [[1, 2, 3]] * 3
    before = [b"before %d" % number for number in range(100)]
    produce(kafka.bootstrap(), "kept", before)
    kafka.brokers[2].kill()
    after = [b"after %d" % number for number in range(100)]
    produce(kafka.bootstrap(), "kept", after)
    shows_all(kafka, before + after)
    kafka.brokers[2].start()
    kafka.brokers[1].wait_ready({1, 2, 3})
    # Every one of them is stopped and started, and the last is killed: too few are left to let it go.
    assert kafka.stop() == []
    kafka.start()
    shows_all(kafka, before + after)


def test_a_broker_dies_with_the_process_that_started_it_though_not_with_the_thread(tmp_path):
    source = """
import sys, threading
from pathlib import Path
from tests.support.kafka_broker import started
found = []
starting = threading.Thread(target=lambda: found.append(started(Path(sys.argv[1]))))
starting.start()
starting.join()
found[0].brokers[1].wait_ready({1})
print(found[0].dir, flush=True)
sys.stdin.read()
"""
    environment = child_environment()
    process = subprocess.Popen(
        [sys.executable, "-c", source, str(tmp_path)],
        cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        kafka = Kafka.open(Path(process.stdout.readline().strip()))
        assert kafka.brokers[1].alive() == {1}
    finally:
        process.kill()
        process.communicate()
    until(lambda: kafka.running == [], "the broker is gone")


# --- other ways in --------------------------------------------------------------------------------


def test_by_way_of_the_proxy_a_client_stays_on_it(proxied_kafka):
    there = proxied_kafka
    create_topic(there.direct, "cut")
    produce(there.bootstrap, "cut", [b"through the proxy"])
    there.proxy.add("lost", "timeout", DOWN, {"timeout": 0})
    with pytest.raises(AssertionError, match="timed out"):
        produce(there.bootstrap, "cut", [b"never acknowledged"], message_timeout_ms=2000)
    there.proxy.heal()
    produce(there.bootstrap, "cut", [b"healed"])
    assert values(there.direct, "cut")[-1] == b"healed"


def test_credentials_are_wanted_where_the_listener_wants_them(private_kafka, tmp_path):
    tls = tls_files(tmp_path / "certs")
    kafka = private_kafka(listeners=[SASL, TLS, SASL_TLS], users={"shop": 'a"b\\c', "other": "x"}, tls=tls)
    create_topic(kafka.bootstrap(PLAIN), "orders")
    known = {"sasl_mechanism": "PLAIN", "sasl_username": "shop", "sasl_password": 'a"b\\c'}
    trusting = {"ssl_ca_location": tls.authority}
    ways = [
        (SASL, {"security_protocol": "SASL_PLAINTEXT", **known}),
        (TLS, {"security_protocol": "SSL", **trusting}),
        (SASL_TLS, {"security_protocol": "SASL_SSL", **known, **trusting}),
    ]
    for listener, settings in ways:
        produce(kafka.bootstrap(listener), "orders", [listener.encode()], **settings)
    assert values(kafka.bootstrap(PLAIN), "orders") == [b"SASL", b"TLS", b"SASL_TLS"]
    wrong = {"security_protocol": "SASL_PLAINTEXT", **known, "sasl_password": "wrong", "log_level": 0}
    with pytest.raises(KafkaException):
        admin(kafka.bootstrap(SASL), **wrong).list_topics(timeout=3)


def test_tests_that_share_the_broker_do_not_meet(kafka, prefix):
    create_topic(kafka.bootstrap(), f"{prefix}.q.default", partitions=3, cleanup_policy="compact")
    assert topics(kafka.bootstrap(), prefix) == [f"{prefix}.q.default"]


# --- what is wrong is said ------------------------------------------------------------------------


def test_a_taken_port_is_named(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        error = oncekeeper(folder, "kafka", "up", "--detach", "--port", str(port), expect=1)["error"]
    assert f"port {port} (listener PLAIN of broker 1) is taken by another process" in error
    assert "--port" in error


def test_a_directory_that_is_none_of_ours_is_left_alone(folder):
    (folder / "oncekeeper-kafka").mkdir()
    (folder / "oncekeeper-kafka" / "letters").write_text("mine")
    error = oncekeeper(folder, "kafka", "up", "--detach", expect=1)["error"]
    assert "is not empty and holds no kafka.json" in error
    assert [each.name for each in (folder / "oncekeeper-kafka").iterdir()] == ["letters"]
    for asked in ("down", "status"):
        assert "holds no Kafka brokers" in oncekeeper(folder, "kafka", asked, expect=1)["error"]
    (folder / "oncekeeper-kafka" / "kafka.json").write_text("{}")
    assert "kafka.json: cannot be read" in oncekeeper(folder, "kafka", "up", expect=1)["error"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--brokers", "2"], "brokers=2 must be 1 or 3"),
        (["--port", "70000"], "port=70000 must be"),
        (["--port", "many"], "port"),
    ],
)
def test_bad_usage_is_told_before_anything_is_made(folder, options, said):
    assert said in oncekeeper(folder, "kafka", "up", *options, expect=2)["error"]
    assert list(folder.iterdir()) == []


def test_the_number_of_brokers_stays(folder):
    Kafka.create(folder / "oncekeeper-kafka")
    error = oncekeeper(folder, "kafka", "up", "--brokers", "3", expect=2)["error"]
    assert "was made with 1; name another directory" in error


def test_a_broker_that_cannot_start_says_why(tmp_path):
    with pytest.raises(KafkaError, match=r"num\.network\.threads"):
        started(tmp_path / "bad", settings={"num.network.threads": "none"})


def test_without_java_that_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(NoKafka, match=r"no Java in JAVA_HOME=.* install Java 17"):
        find_java()
    old = tmp_path / "bin" / "java"
    old.parent.mkdir()
    old.write_text("#!/bin/sh\necho 'openjdk version \"1.8.0_392\"' >&2\n")
    old.chmod(0o755)
    with pytest.raises(NoKafka, match="is Java 8, and Kafka needs 17"):
        find_java()


def test_a_kafka_of_ones_own_is_taken_and_an_old_one_is_not(monkeypatch, tmp_path):
    monkeypatch.delenv("ONCEKEEPER_KAFKA", raising=False)
    monkeypatch.setenv("KAFKA_HOME", str(tmp_path))
    with pytest.raises(NoKafka, match=r"KAFKA_HOME=.* holds no Kafka"):
        find_jars()
    (tmp_path / "libs").mkdir()
    (tmp_path / "libs" / "kafka_2.13-3.9.1.jar").touch()
    with pytest.raises(NoKafka, match=r"is Kafka 3\.9, and this needs 4\.0 or newer"):
        find_jars()
    (tmp_path / "libs" / "kafka_2.13-3.9.1.jar").rename(tmp_path / "libs" / "kafka_2.13-4.1.0-rc1.jar")
    assert find_jars() == tmp_path / "libs"


def get_kafka(**environment):
    given = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    return subprocess.run(
        [ROOT / "tools" / "get-kafka"], capture_output=True, text=True, check=False, env=given | environment
    )


def test_the_tool_says_what_is_missing(tmp_path):
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "dirname").symlink_to("/usr/bin/dirname")
    empty = {"PATH": str(programs), "PYTHON": sys.executable, "XDG_CACHE_HOME": str(tmp_path)}
    ran = get_kafka(**empty, JAVA_HOME="")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "there is no Java on PATH" in ran.stderr
    ran = get_kafka(**empty, JAVA_HOME=str(Path(find_java()).parent.parent))
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "no Maven (mvn) on PATH" in ran.stderr
    assert not cache_path().is_relative_to(tmp_path)


def test_what_maven_could_not_get_leaves_nothing_behind(tmp_path):
    maven = tmp_path / "programs" / "mvn"
    maven.parent.mkdir()
    maven.write_text("#!/bin/sh\necho '[ERROR] the registry is on fire'\nexit 1\n")
    maven.chmod(0o755)
    cache = tmp_path / "cache"
    ran = get_kafka(PATH=f"{maven.parent}:{os.environ['PATH']}", XDG_CACHE_HOME=str(cache))
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "the registry is on fire" in ran.stderr
    assert list((cache / "oncekeeper").iterdir()) == []
    maven.write_text("#!/bin/sh\nexit 0\n")
    ran = get_kafka(PATH=f"{maven.parent}:{os.environ['PATH']}", XDG_CACHE_HOME=str(cache))
    assert "the registry is incomplete" in ran.stderr
    assert list((cache / "oncekeeper").iterdir()) == []


def test_two_who_get_kafka_at_the_same_time_do_not_disturb_each_other(tmp_path):
    maven = tmp_path / "programs" / "mvn"
    maven.parent.mkdir()
    maven.write_text(
        "#!/bin/sh\n"
        "for each; do case $each in -DoutputDirectory=*) mkdir -p ${each#*=}; cd ${each#*=};; esac; done\n"
        f"touch {' '.join(NEEDED)}\n"
        f"touch {tmp_path}/met.$$\n"  # both are here before either goes on
        f'until [ "$(ls {tmp_path} | grep -c met)" = 2 ]; do sleep 0.05; done\n'
    )
    maven.chmod(0o755)
    given = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    given |= {"PATH": f"{maven.parent}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    both = [
        subprocess.Popen([ROOT / "tools" / "get-kafka"], env=given, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    told = [each.communicate(timeout=60)[0].strip() for each in both]
    assert told == [str(tmp_path / "cache" / "oncekeeper" / cache_path().name / "lib")] * 2
    assert len(list((tmp_path / "cache" / "oncekeeper").iterdir())) == 1
