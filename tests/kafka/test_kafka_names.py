"""Addresses, topics, numbers and settings: nothing here needs a broker."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncekeeper.errors import LogUnusable
from oncekeeper.log.kafka_names import Names, parse_url
from oncekeeper.log.kafka_settings import (
    FILE_VARIABLE,
    HIDDEN,
    REFUSED,
    KafkaSettings,
    check_plain,
    load,
    read_file,
    variable,
)


@pytest.mark.parametrize(
    ("url", "servers", "prefix"),
    [
        ("kafka://h:1", "h:1", "oncekeeper"),
        ("kafka://h", "h:9092", "oncekeeper"),
        ("kafka://a:1,b:2/shop", "a:1,b:2", "shop"),
        ("kafka://[::1]:9094/team.shop/", "[::1]:9094", "team.shop"),
        ("kafka://[::1]", "[::1]:9092", "oncekeeper"),
    ],
)
def test_an_address_names_servers_and_a_prefix(url: str, servers: str, prefix: str) -> None:
    found = parse_url(url)
    assert (found.servers, found.prefix) == (servers, prefix)


@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("kafka:h:1", "must be kafka://HOST:PORT"),
        ("http://h:1", "must be kafka://HOST:PORT"),
        ("kafka://", "must be HOST:PORT"),
        ("kafka://a:1,,b:2", "must be HOST:PORT"),
        ("kafka://h:x", "the port of 'h:x' must be from 1 to 65535"),
        ("kafka://h:70000", "the port of 'h:70000' must be from 1 to 65535"),
        ("kafka://h:1/a b", "prefix='a b' must have 1 to 40 letters"),
        ("kafka://h:1/a.q", "no part of it after a dot may be 'q'"),
        ("kafka://h:1/" + "x" * 41, "must have 1 to 40 letters"),
        ("kafka://h:1?acks=1", "'?' has no meaning here"),
    ],
)
def test_an_address_that_is_none_is_refused_with_the_rule(url: str, rule: str) -> None:
    with pytest.raises(LogUnusable, match=re.escape(rule)):
        parse_url(url)


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    for url in ("kafka://me:hunter2@h:1", "kafka://me:hunter2@h:1/shop", "http://me:hunter2@h:1"):
        with pytest.raises(LogUnusable) as caught:
            parse_url(url)
        assert "hunter2" not in str(caught.value)


def test_the_default_queue_has_the_small_numbers_and_others_have_exact_large_ones() -> None:
    names, later = Names("shop"), Names("shop")
    assert [names.number("shop.q.default", n) for n in range(3)] == [0, 1, 2]
    mail = [names.number("shop.q.mail", n) for n in range(3)]
    assert mail == [mail[0], mail[0] + 1, mail[0] + 2]
    assert 2**52 <= mail[0] < 2**53
    assert int(float(mail[2])) == mail[2], "JSON keeps it"
    assert later.number("shop.q.mail", 2) == mail[2], "the same in every process"
    assert [names.place(number) for number in (1, mail[2])] == [("shop.q.default", 1), ("shop.q.mail", 2)]
    with pytest.raises(KeyError):
        Names("shop").place(mail[0])


@given(
    st.lists(st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,30}", fullmatch=True), unique=True, max_size=20)
)
def test_queues_have_topics_of_their_own_that_kafka_allows(queues: list[str]) -> None:
    names = Names("shop")
    topics = [names.topic(queue) for queue in queues]
    assert len(set(topics)) == len(queues)
    assert [names.queue(topic) for topic in topics] == queues
    assert all(
        names.is_queue_topic(topic) and re.fullmatch(r"[A-Za-z0-9._-]{1,249}", topic) for topic in topics
    )


def test_a_topic_of_something_else_is_no_queue() -> None:
    names = Names("shop")
    others = ("shop.dead", "shop.suspect", "shop.cluster", "shop.q.", "shop2.q.default", "other")
    assert not any(map(names.is_queue_topic, others))
    with pytest.raises(LogUnusable, match="Kafka allows 249"):
        names.topic(":" * 200)


# --- settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_setting_that_would_break_a_promise_is_refused_by_name(name: str) -> None:
    with pytest.raises(LogUnusable, match=re.escape(repr(name))):
        KafkaSettings({name: "true"})


@pytest.mark.parametrize(
    ("name", "value"),
    [("acks", "0"), ("request.required.acks", "2"), ("isolation.level", "read_uncommitted")],
)
def test_a_value_that_would_break_a_promise_is_refused(name: str, value: str) -> None:
    with pytest.raises(LogUnusable, match=f"{re.escape(name)}='{value}' must be"):
        KafkaSettings({name: value})


def test_settings_of_javas_client_are_explained() -> None:
    with pytest.raises(
        LogUnusable, match=r"'sasl\.jaas\.config' is one of Java's client: give sasl\.username"
    ):
        KafkaSettings({"sasl.jaas.config": "x"})


def test_all_else_passes_through_to_the_clients_that_it_is_for() -> None:
    settings = KafkaSettings({"compression.type": "lz4", "fetch.min.bytes": "2", "client.rack": "r1"})
    producer, consumer, admin = settings.producer("h:1"), settings.consumer("h:1"), settings.admin("h:1")
    assert (producer["compression.type"], consumer["fetch.min.bytes"]) == ("lz4", "2")
    assert "fetch.min.bytes" not in producer
    assert "compression.type" not in consumer
    assert {each["client.rack"] for each in (producer, consumer, admin)} == {"r1"}
    assert {each["bootstrap.servers"] for each in (producer, consumer, admin)} == {"h:1"}


@pytest.mark.parametrize(
    "name", ["sasl.password", "ssl.key.password", "ssl.key.pem", "sasl.oauthbearer.client.secret"]
)
def test_secrets_show_nowhere_and_have_no_place_in_a_plain_configuration(name: str) -> None:
    with pytest.raises(LogUnusable, match=re.escape(repr(name))) as caught:
        check_plain({name: "hunter2"})
    assert "hunter2" not in str(caught.value)
    assert variable(name) in str(caught.value)
    settings = KafkaSettings({name: "hunter2", "sasl.username": "me"})
    assert "hunter2" not in repr(settings) + str(settings) + str(settings.shown())
    assert settings.shown() == {name: HIDDEN, "sasl.username": "me"}
    assert settings.clean("wrong: hunter2!") == f"wrong: {HIDDEN}!"
    assert settings.admin("h:1")[name] == "hunter2"


def test_the_environment_goes_before_the_file_and_the_file_before_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "kafka.properties"
    file.write_text("# ours\n\nsasl.username = file\nsasl.password=a=b c\nclient.id=file\n")
    file.chmod(0o600)
    environ = {FILE_VARIABLE: str(file), "ONCEKEEPER_KAFKA_CLIENT_ID": "environment", "OTHER": "x"}
    found = load({"client.id": "plain", "sasl.username": "plain", "linger.ms": "3"}, environ=environ)
    assert {
        name: found.get(name) for name in ("client.id", "sasl.username", "sasl.password", "linger.ms")
    } == {
        "client.id": "environment",
        "sasl.username": "file",
        "sasl.password": "a=b c",
        "linger.ms": "3",
    }


def test_a_file_that_others_can_read_is_refused_with_the_rule(tmp_path: Path) -> None:
    file = tmp_path / "kafka.properties"
    file.write_text("sasl.password=hunter2\n")
    file.chmod(0o640)
    with pytest.raises(LogUnusable, match="mode 0640 lets others read it: it must be 0600") as caught:
        read_file(file)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("linger.ms=1\nhunter2\n", ":2: a line must be NAME=VALUE"),
        ("sasl.password=hunter2\nsasl.password=hunter2\n", ":2: sasl.password stands here twice"),
        ("enable.auto.commit=true\n", "'enable.auto.commit' cannot be set"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_line_and_its_content_not_repeated(
    tmp_path: Path, text: str, said: str
) -> None:
    file = tmp_path / "kafka.properties"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(LogUnusable, match=re.escape(said)) as caught:
        read_file(file)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(LogUnusable, match="No such file"):
        read_file(tmp_path / "none")
