"""What fuzzing found, each as the rule that it broke; whole inputs are seeds in tests/support/fuzz_targets.py."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from dedup.ids import Ids
from node.workers import journal as layout
from node.workers.port import Mode
from node.workers.testimony import MANIFEST, Manifest, read_testimony, weigh
from oncekeeper.envelope import InvalidTask, explain, validate_message
from raft.codec import CodecError, open_snapshot, seal_snapshot
from raft.commands import Proposal
from raft.journal_format import SegmentHeader, decode_segment_header
from raft.ledger import Ledger
from raft.ledger_snapshot import _Body
from tests.support.fuzz_targets import COMMANDS, work_file


@pytest.mark.parametrize(("text", "field", "rule"), [
    (b'{"handler":"h","body":{"a":"\xff"}}', "body", "must be UTF-8: invalid start byte at byte 6"),
    (b'{"handler":"\xff","body":{}}', "message", "invalid start byte"),
    (b'{"handler":"h","body":{},"due":"9999-12-31T23:59:59-01:00"}', "due", "before 10000"),
])  # fmt: skip
def test_a_task_that_could_not_be_written_again_is_refused(text: bytes, field: str, rule: str):
    with pytest.raises(InvalidTask, match=rule) as refused:
        validate_message(text)
    assert refused.value.field == field


def test_bodies_beyond_ascii_pass_as_they_are():
    body = '{"name":"Žofie 🚀"}'.encode()
    assert validate_message(b'{"handler":"h","body":' + body + b"}").body == body


def test_a_refusal_does_not_send_back_all_that_it_refused():
    name = "x" * 1_000_000
    with pytest.raises(InvalidTask) as refused:
        validate_message(b'{"' + name.encode() + b'":1}')
    assert len(str(refused.value)) < 1000
    assert all(len(part) <= 300 for part in explain(ValueError(name), "whole"))


def test_an_entry_whose_ids_and_states_differ_in_number_is_no_evidence():
    packed = layout.pack_ids(Ids(((5, 2**63 - 1),), (b"k" * 16,)))
    numbers = (9, int(Mode.RUN), layout.DATA_AT, 1, 1, 3)
    entry = layout.ENTRY.pack(*numbers, layout.entry_crc(*numbers, packed))
    evidence = weigh(
        Manifest(1, 7, "boot", ("slot",)),
        "boot",
        lambda name: work_file([entry], packed + b"\0\1\2").replace(
            layout.pack_header(layout.DATA_AT + len(packed) + 3, 7, "b" * 32),
            layout.pack_header(layout.DATA_AT + len(packed) + 3, 7, "boot"),
        ),
    )
    assert (evidence.complete, evidence.facts) == (False, ())
    assert "it names other than its 3 tasks" in evidence.why


def test_a_manifest_that_is_no_text_is_damaged(tmp_path: Path):
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / MANIFEST).write_bytes(b'{"boot_id":"\xff"}')
    assert "is damaged" in read_testimony(tmp_path, 7, wait_s=0).why


def test_a_segment_whose_vote_is_no_text_is_damaged():
    good = SegmentHeader(1, bytes(16), 1, 1, 0, 3, "n1").encode()
    assert decode_segment_header(good) is not None
    from google_crc32c import value as crc32c

    body = good[:-4].replace(b"n1", b"\xff\xfe")
    assert decode_segment_header(body + crc32c(body).to_bytes(4, "little")) is None


@pytest.mark.parametrize("run", [(5, -3, 0), (0, 1, 0), (2**63 - 1, 2, 0), (-1, 1, 0)])
def test_a_snapshot_with_runs_that_hold_no_ids_is_refused_whole(run: tuple[int, int, int]):
    ledger = Ledger(1)
    for index, command in enumerate(COMMANDS, 1):
        ledger.apply_proposal(index, Proposal(1, index, (command,)))
    body = msgspec.msgpack.decode(open_snapshot(ledger.snapshot()))
    place = _Body.__struct_fields__.index("runs")
    assert body[place]
    body[place][0] = run
    other = Ledger(1)
    before = other.digest()
    with pytest.raises(CodecError, match="contradicts itself"):
        other.restore(seal_snapshot(msgspec.msgpack.encode(body)))
    assert other.digest() == before
