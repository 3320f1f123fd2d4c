"""The task message: what is encoded decodes to the same, and what breaks a rule is named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oncekeeper
from dedup.ids import RANGE_ID_MAX, Ids, id_text, keyed_id
from oncekeeper.envelope import (
    BODY_BYTES_MAX,
    TTR_MS_MAX,
    Message,
    TaskBatch,
    batches_of,
    decode_batch,
    decode_task,
    encode_batch,
    encode_task,
    validate_message,
)
from oncekeeper.errors import InvalidTask

SCHEMA = json.loads((Path(oncekeeper.__file__).parent / "task.schema.json").read_text())
TRACE = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
GOOD: dict[str, Any] = {
    "v": 1,
    "id": "17",
    "queue": "mail",
    "handler": "shop.send",
    "body": {"to": "a"},
    "due": "2026-05-06T07:08:09.010Z",
    "ttr_ms": 30_000,
    "attempt": 2,
    "key": None,
    "traceparent": TRACE,
    "submitted": "2026-01-31T12:00:00Z",
    "submitted_by": "host:1 test",
}
FULL = TaskBatch(
    queue="mail",
    handler="shop.send",
    ids=Ids(((17, 2),)),
    bodies=(b'{"to":"a"}', b'{"to": "\xc3\xa9", "x": [1, {"y": null}]}'),
    ttr_ms=30_000,
    due_ms=1_778_051_289_010,
    attempt=2,
    traceparent=TRACE,
    submitted_ms=1_769_860_800_000,
    submitted_by="host:1 test",
)
NAMES = ("order-1", "", 'quote"d')
KEYED = TaskBatch(
    queue="default",
    handler="shop.charge",
    ids=Ids(keys=(keyed_id("default", "order-1"), b"r" * 16, keyed_id("default", 'quote"d'))),
    bodies=(b"{}", b"{}", b'{"a":1}'),
    keys=NAMES,
)


DEEP = b'{"v":1,"id":"1","count":1,"queue":"q","handler":"h","body":' + b'{"a":' * 50_000


def raw(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode()


def schema_takes(message: object) -> bool:
    return not list(jsonschema.Draft202012Validator(SCHEMA).iter_errors(message))


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("batch", [FULL, KEYED], ids=["run", "keyed"])
def test_a_batch_decodes_to_what_was_encoded(batch: TaskBatch) -> None:
    assert decode_batch(encode_batch(batch)) == batch
    assert schema_takes(json.loads(encode_batch(batch)))


@pytest.mark.parametrize("batch", [FULL, KEYED], ids=["run", "keyed"])
def test_a_single_task_decodes_to_what_was_encoded(batch: TaskBatch) -> None:
    for at in range(len(batch)):
        one = batch.part(at, 1)
        decoded = decode_task(encode_task(one))
        assert (decoded.ids, decoded.bodies, decoded.due_ms) == (one.ids, one.bodies, one.due_ms)
        assert decoded.keys == (one.keys if any(one.keys) else ())
        assert schema_takes(json.loads(encode_task(one)))


@given(
    start=st.integers(1, RANGE_ID_MAX - 10),
    bodies=st.lists(
        st.dictionaries(st.text(), st.integers() | st.text() | st.none()), min_size=1, max_size=5
    ),
    due_ms=st.integers(0, 4_000_000_000_000),
    by=st.text(max_size=20),
)
def test_any_batch_survives_the_way_through_json(
    start: int, bodies: list[dict[str, Any]], due_ms: int, by: str
) -> None:
    batch = TaskBatch(
        queue="q",
        handler="h",
        ids=Ids(((start, len(bodies)),)),
        bodies=tuple(raw(body) for body in bodies),
        due_ms=due_ms,
        submitted_by=by,
    )
    assert decode_batch(encode_batch(batch)) == batch


def test_bodies_are_passed_on_byte_for_byte() -> None:
    odd = b'{ "a" :1e400,\n"a": 00012345678901234567890 }'.replace(b"000", b"")
    message = validate_message(b'{"handler": "h", "body": ' + odd + b"}")
    assert message.body == odd


def test_a_message_needs_only_a_handler_and_a_body() -> None:
    assert validate_message(b'{"handler":"shop.send","body":{}}') == Message(handler="shop.send", body=b"{}")
    assert schema_takes({"handler": "shop.send", "body": {}})


def test_every_field_arrives() -> None:
    assert validate_message(raw(GOOD)) == Message(
        handler="shop.send",
        body=b'{"to": "a"}',
        id=17,
        queue="mail",
        ttr_ms=30_000,
        due_ms=1_778_051_289_010,
        attempt=2,
        traceparent=TRACE,
        submitted_ms=1_769_860_800_000,
        submitted_by="host:1 test",
    )
    assert schema_takes(GOOD)


def test_a_key_makes_the_id() -> None:
    expected = keyed_id("mail", "order-1")
    without_id = {**GOOD, "id": None, "key": "order-1"}
    assert validate_message(raw(without_id)).id == expected
    assert validate_message(raw({**without_id, "id": id_text(expected)})).id == expected


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"v": 2}, "v", "understands 1, not 2"),
    ({"ttr_ms": -1}, "ttr_ms", f"from 0 (the handler's own) to {TTR_MS_MAX}, not -1"),
    ({"ttr_ms": TTR_MS_MAX + 1}, "ttr_ms", "not 604800001"),
    ({"ttr_ms": "5"}, "ttr_ms", "expected int, got str"),
    ({"body": [1]}, "body", "must be a JSON object"),
    ({"body": "text"}, "body", "must be a JSON object"),
    ({"id": "0"}, "id", "must be from 1 to"),
    ({"id": "x1"}, "id", "must be decimal digits"),
    ({"id": 5}, "id", "expected str | null, got int"),
    ({"due": "tomorrow"}, "due", "ISO 8601"),
    ({"due": "2026-05-06T07:08:09"}, "due", "must name its time zone"),
    ({"attempt": 0}, "attempt", "must be 1 or more, not 0"),
    ({"key": ""}, "key", "1 to 512 bytes"),
    ({"key": "k" * 513, "id": None}, "key", "1 to 512 bytes, not 513"),
    ({"queue": ""}, "queue", "must match"),
    ({"queue": "a b"}, "queue", "must match"),
    ({"handler": "../x"}, "handler", "must match"),
    ({"traceparent": "00-xyz"}, "traceparent", "W3C"),
    ({"ttr": 5}, "ttr", "unknown field"),
]


@pytest.mark.parametrize(
    ("change", "field", "rule"), BAD, ids=[f"{f}-{n}" for n, (_, f, _) in enumerate(BAD)]
)
def test_a_broken_rule_is_named_and_the_schema_agrees(change: dict[str, Any], field: str, rule: str) -> None:
    message = {**GOOD, **change}
    with pytest.raises(InvalidTask) as caught:
        validate_message(raw(message))
    assert caught.value.field == field
    assert rule in caught.value.rule
    if change.get("id") != "0" and not str(change.get("due", "")).startswith("2026"):
        assert not schema_takes(message)


@pytest.mark.parametrize("field", ["handler", "body"])
def test_what_is_missing_is_named(field: str) -> None:
    message = {name: value for name, value in GOOD.items() if name != field}
    with pytest.raises(InvalidTask, match=f"{field}: missing"):
        validate_message(raw(message))
    assert not schema_takes(message)


def test_a_body_over_the_limit_is_refused() -> None:
    fits = b'{"x":"' + b"y" * (BODY_BYTES_MAX - 8) + b'"}'
    assert len(validate_message(b'{"handler":"h","body":' + fits + b"}").body) == BODY_BYTES_MAX
    with pytest.raises(InvalidTask, match=f"body: has {BODY_BYTES_MAX + 1} bytes"):
        validate_message(b'{"handler":"h","body":' + fits.replace(b"y", b"yy", 1) + b"}")


def test_key_and_id_that_disagree_are_refused() -> None:
    with pytest.raises(InvalidTask, match="17 disagrees with key='order-1' of queue 'mail'"):
        validate_message(raw({**GOOD, "key": "order-1"}))


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"\xff", b'{"handler":"h","body":{"a":}}', b"[" * 100_000, DEEP]
)
def test_what_is_no_message_is_refused(text: bytes) -> None:
    for decode in (validate_message, decode_task, decode_batch):
        with pytest.raises(InvalidTask):
            decode(text)


ROW = {"v": 1, "queue": "q", "handler": "h", "id": "5", "count": 2, "bodies": [{}, {}]}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"v": 9}, "v"),
        ({"count": 3}, "bodies"),
        ({"count": 0}, "bodies"),
        ({"bodies": []}, "bodies"),
        ({"id": str(RANGE_ID_MAX)}, "id"),
        ({"id": None}, "bodies"),
        ({"id": None, "ids": ["k" + "0" * 32, "5"]}, "bodies"),
        ({"id": None, "ids": ["k" + "0" * 32, "k" + "1" * 32], "keys": ["a"]}, "keys"),
        ({"due": "x"}, "due"),
    ],
)
def test_a_row_that_breaks_a_rule_is_refused(change: dict[str, Any], field: str) -> None:
    assert len(decode_batch(raw(ROW))) == 2
    with pytest.raises(InvalidTask) as caught:
        decode_batch(raw({**ROW, **change}))
    assert caught.value.field == field


def test_a_row_may_have_fields_of_a_later_day() -> None:
    assert len(decode_batch(raw({**ROW, "colour": "red"}))) == 2


def test_neighbours_are_gathered_into_one_batch() -> None:
    def message(task_id: int | bytes, queue: str = "q", key: str = "") -> Message:
        return Message(handler="h", body=b"{}", id=task_id, queue=queue, key=key)

    batches = batches_of(
        [message(1), message(2), message(4), message(5, "r"), message(b"a" * 16), message(b"b" * 16, key="b")]
    )
    assert [batch.ids for batch in batches] == [
        Ids(((1, 2),)),
        Ids(((4, 1),)),
        Ids(((5, 1),)),
        Ids(keys=(b"a" * 16, b"b" * 16)),
    ]
    assert batches[-1].keys == ("", "b")


def test_a_message_without_an_id_makes_no_batch() -> None:
    with pytest.raises(InvalidTask, match="id: missing"):
        decode_task(b'{"handler":"h","body":{}}')


def test_only_one_task_makes_a_task_message() -> None:
    with pytest.raises(ValueError, match="holds 1 task, the batch has 2"):
        encode_task(FULL)
