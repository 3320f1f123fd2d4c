"""Records read the short way are those that the long way gives, whatever stands between, before and after them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from dedup.ids import Ids, keyed_id
from oncekeeper.envelope import TaskBatch, encode_task, validate_message
from oncekeeper.errors import InvalidTask
from oncekeeper.log.kafka_codec import items, messages
from oncekeeper.log.port import Fetched, Gap, Item, Undecodable


class Record:
    def __init__(self, offset: int, value: bytes | None) -> None:
        self._offset, self._value = offset, value

    def offset(self) -> int:
        return self._offset

    def value(self) -> bytes | None:
        return self._value


texts = st.text(max_size=12)
bodies = st.dictionaries(
    st.sampled_from(["a", "id", "body", "ü"]), st.integers() | texts | st.none(), max_size=3
)
nested = st.recursive(
    bodies, lambda inner: st.dictionaries(st.sampled_from(["id", "body", "x"]), inner), max_leaves=4
)


def encoded(body: object) -> bytes:
    return json.dumps(body, ensure_ascii=False).encode()


@st.composite
def batches(draw: st.DrawFn) -> TaskBatch:
    count = draw(st.integers(1, 6))
    queue = draw(st.sampled_from(["default", "mail"]))
    by = draw(st.sampled_from(["range", "digest", "key"]))
    given_keys = tuple(f"{n}{draw(texts)}" for n in range(count))
    start = draw(st.integers(0, 2**62))
    digests = tuple(keyed_id(queue, key) for key in given_keys)
    return TaskBatch(
        queue=queue,
        handler=draw(st.sampled_from(["shop.charge", "shop.mail"])),
        ids=Ids(((start, count),)) if by == "range" else Ids(keys=digests),
        keys=given_keys if by == "key" else (),
        bodies=tuple(encoded(draw(nested)) for _ in range(count)),
        ttr_ms=draw(st.sampled_from([0, 5000])),
        due_ms=draw(st.sampled_from([0, 1_700_000_000_000])),
        submitted_ms=draw(st.sampled_from([0, 1_700_000_000_001])),
        submitted_by=draw(texts),
    )


def by_the_long_way(records: Sequence[Record]) -> list[tuple[int, object]]:
    """Offset by offset: the message, or why there is none."""
    found: list[tuple[int, object]] = []
    for record in records:
        value = record.value()
        try:
            if value is None:
                raise InvalidTask("message", "the record has no value (a tombstone)")
            message = validate_message(value)
        except InvalidTask as error:
            found.append((record.offset(), str(error)))
            continue
        task_id = message.id if message.id is not None else keyed_id("kafka", f"t/0/{record.offset()}")
        found.append((record.offset(), (task_id, message.body, message.key, message.options())))
    return found


def one_by_one(read: list[Item]) -> list[tuple[int, object]]:
    found: list[tuple[int, object]] = []
    for item in read:
        if isinstance(item, Undecodable):
            found.append((item.base, item.reason))
        elif isinstance(item, Fetched):
            for at, task_id in enumerate(item.batch.ids):
                one = item.batch.part(at, 1)
                [message] = [validate_message(encode_task(one))]
                key = one.keys[0] if one.keys else ""
                found.append((item.base + at, (task_id, one.bodies[0], key, message.options())))
    return found


@given(st.lists(batches(), max_size=4), st.data())
def test_neighbours_are_read_as_each_would_be_alone(several: list[TaskBatch], data: st.DataObject) -> None:
    values: list[bytes | None] = [value for batch in several for _, value in messages(batch)]
    for _ in range(data.draw(st.integers(0, 3))):  # what others wrote, and what was damaged, among them
        if not values:
            break
        at = data.draw(st.integers(0, len(values) - 1))
        value = values[at]
        damage = data.draw(st.sampled_from(["cut", "flip", "none", "foreign", "again", "swap", "tail"]))
        text = value or b""
        if damage == "cut":
            values[at] = text[: data.draw(st.integers(0, len(text)))]
        elif damage == "flip" and text:
            place = data.draw(st.integers(0, len(text) - 1))
            values[at] = text[:place] + bytes([data.draw(st.integers(0, 255))]) + text[place + 1 :]
        elif damage == "none":
            values[at] = None
        elif damage == "foreign":
            values[at] = encoded({"handler": "shop.charge", "body": data.draw(nested)})
        elif damage == "again":
            values.insert(at, value)
        elif damage == "swap":
            values[at], values[0] = values[0], values[at]
        elif damage == "tail":
            values[at] = text + data.draw(st.sampled_from([b"}", b" ", b"{}", b',"v":1}']))
    offset = data.draw(st.integers(0, 2**40))
    records = []
    for value in values:
        offset += data.draw(st.sampled_from([1, 1, 1, 3]))
        records.append(Record(offset, value))
    read = items(7, "t", 0, records)
    assert one_by_one(read) == by_the_long_way(records)
    # Every offset from the first to the last is covered once.
    if records:
        assert read[0].base == records[0].offset()
        assert all(one.end == following.base for one, following in pairwise(read))
        assert read[-1].end == records[-1].offset() + 1
        assert not any(isinstance(item, Gap) for item in (read[0], read[-1]))


def test_a_submit_of_many_is_read_as_few_batches() -> None:
    batch = TaskBatch(
        queue="q", handler="h", ids=Ids(((10, 5000),)), bodies=(b'{"n":1}',) * 5000, submitted_ms=9
    )
    records = [Record(at, value) for at, (_, value) in enumerate(messages(batch))]
    read = items(3, "t", 0, records)
    assert [len(item.batch) for item in read if isinstance(item, Fetched)] == [2048, 2048, 904]
    assert [item.base for item in read] == [0, 2048, 4096]


def test_what_is_gathered_is_bounded_in_bytes() -> None:
    body = encoded({"x": "y" * 200_000})
    batch = TaskBatch(queue="q", handler="h", ids=Ids(((10, 50),)), bodies=(body,) * 50)
    read = items(3, "t", 0, [Record(at, value) for at, (_, value) in enumerate(messages(batch))])
    assert max(len(item.batch) for item in read if isinstance(item, Fetched)) <= 6
    assert sum(len(item.batch) for item in read if isinstance(item, Fetched)) == 50


def test_a_text_within_a_body_is_not_taken_for_an_envelope() -> None:
    inner = b'{"handler":"h","body":{"id":"5","body":{}}}'
    outer = b'{"handler":"h","body":{"id":"6","body":{}}}'
    read = items(0, "t", 0, [Record(0, inner), Record(1, outer)])
    assert one_by_one(read) == by_the_long_way([Record(0, inner), Record(1, outer)])


def test_a_record_without_an_id_gets_one_of_its_place() -> None:
    value = b'{"handler":"shop.charge","body":{}}'
    (first,) = items(0, "shop.q.default", 4, [Record(17, value)])
    (again,) = items(0, "shop.q.default", 4, [Record(17, value)])
    (other,) = items(0, "shop.q.default", 4, [Record(18, value)])
    assert isinstance(first, Fetched)
    assert isinstance(other, Fetched)
    assert first == again
    assert first.batch.ids != other.batch.ids


def test_a_keyed_record_whose_id_is_not_its_keys_own_is_refused_also_among_neighbours() -> None:
    keys = tuple(f"order-{n}" for n in range(4))
    batch = TaskBatch(
        queue="q", handler="h", ids=Ids(keys=tuple(keyed_id("q", key) for key in keys)), keys=keys,
        bodies=(b'{"n":1}',) * 4,
    )  # fmt: skip
    values = [value for _, value in messages(batch)]
    values[2] = values[2].replace(b'"order-2"', b'"order-3"')
    records = [Record(at, value) for at, value in enumerate(values)]
    read = items(3, "t", 0, records)
    assert [type(item) for item in read] == [Fetched, Undecodable, Fetched]
    assert one_by_one(read) == by_the_long_way(records)


def test_a_record_that_names_no_queue_is_of_its_topics() -> None:
    values = [b'{"handler":"h","body":{},"key":"k"}', b'{"handler":"h","body":{},"queue":"other"}']
    read = items(0, "shop.q.mail", 0, [Record(at, value) for at, value in enumerate(values)], "mail")
    first, second = (item.batch for item in read if isinstance(item, Fetched))
    assert (first.queue, first.ids.keys) == ("mail", (keyed_id("mail", "k"),))
    assert second.queue == "other"
