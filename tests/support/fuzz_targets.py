"""Every reader of bytes that somebody else wrote, as a function of bytes: what to feed it, and what it may raise.

``TARGETS`` is used by hypothesis (tests/property/test_fuzz_readers.py, always) and by Atheris
(tests/chaos/fuzz_atheris.py, ``make fuzz``). A target raises only what its reader documents; any other exception is
a finding. Where a checksum guards the bytes there is a second target that mends it first, because otherwise nothing
behind the checksum would ever be reached.
"""

from __future__ import annotations

import atexit
import json
import shutil
import struct
import tempfile
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import msgspec
from google_crc32c import value as crc32c

from dedup.ids import Ids
from node.http.steer import Ruling
from node.http.submit import WantedIds, _messages
from node.http.wire import ApiError, parse
from node.workers import frames
from node.workers import journal as layout
from node.workers.port import Mode
from node.workers.testimony import MANIFEST, Manifest, read_testimony, weigh
from oncekeeper.envelope import (
    InvalidTask,
    TaskBatch,
    batches_of,
    decode_batch,
    decode_task,
    encode_batch,
    encode_task,
    validate_message,
)
from raft import journal_format as segments
from raft import wire
from raft.codec import CodecError, decode_proposal, encode_proposal, open_snapshot, seal_snapshot
from raft.commands import (
    Advance,
    AllocateIds,
    Claim,
    Fact,
    Join,
    Proposal,
    Result,
    Settle,
    Settlement,
    Testify,
    Testimony,
)
from raft.journal_recovery import JournalError, recover, segment_name
from raft.ledger import Ledger
from raft.snapshots import SnapshotError, SnapshotHeader, SnapshotStore
from raft.tls import TlsRefused, certified_node
from tests.support.raft_bomb import bomb


@dataclass(frozen=True)
class Target:
    read: Callable[[bytes], object]
    may_raise: tuple[type[Exception], ...]
    seeds: tuple[bytes, ...]

    def __call__(self, data: bytes) -> None:
        try:
            self.read(data)
        except self.may_raise:
            return


BOMB: Final = bomb()
DEEP: Final = b"[" * 5000
DEEP_PACK: Final = b"\x91" * 5000

# --- links --------------------------------------------------------------------------------------------------------

MESSAGES: Final = (
    wire.AppendEntries(3, 2, 1, 1, [(2, b"a" * 20), (3, BOMB)], True),
    wire.AppendReply(1, 2, 3),
    wire.SnapshotChunk(1, 2, 3, 1, 100, 7, 0, b"x" * 50),
    wire.VoteRequest(1, 2, 1),
    wire.Propose(1, [b"p" * 17]),
    wire.ProposeRefused(1, [b"t" * 16]),
    wire.Ping(),
)
HANDSHAKES: Final = (
    wire.Hello("c", "n1", "voter", "n2", b"n" * 32),
    wire.Challenge("n2", "voter", b"n" * 32, b"p" * 32),
    wire.Proof(b"p" * 32),
)


def read_frames(data: bytes) -> None:
    """A stream in chunks of uneven sizes, as it comes from a socket."""
    reader = wire.FrameReader(wire.FRAME_BYTES_MAX)
    at, size = 0, 1
    while at < len(data):
        reader.feed(data[at : at + size])
        at, size = at + size, size * 7 % 1000 + 1
        while (body := reader.next()) is not None:
            wire.decode(body)


def read_worker_frames(data: bytes) -> None:
    reader = frames.Frames()
    for at in range(0, len(data), 100):
        for _ in reader.feed(data[at : at + 100]):
            pass


def read_certificate_names(data: bytes) -> None:
    names = tuple(("URI", part) for part in data.decode(errors="replace").split("\n"))
    certified_node({"subjectAltName": names}, "c" * 32)


# --- journal ------------------------------------------------------------------------------------------------------

CLUSTER: Final = bytes(16)


class OneSegment:
    """A directory with one segment and a mark that proves nothing of it."""

    def __init__(self, data: bytes, proven: int) -> None:
        mark = segments.Mark(1, 1, proven, 0).encode().ljust(2 * segments.MARK_SLOT_BYTES, b"\0")
        self._files = {segment_name(1): data, "mark": mark}

    def list(self, directory: str) -> list[str]:
        from raft.journal_recovery import MARK_NAME

        return sorted([segment_name(1), MARK_NAME])

    def exists(self, path: str) -> bool:
        return path.endswith(segment_name(1))

    def read(self, path: str) -> bytes:
        return self._files.get(path.rpartition("/")[2], self._files["mark"])


def recover_segment(data: bytes) -> None:
    recover(cast(Any, OneSegment(data, 0)), "/j", CLUSTER)


def mend_segment(data: bytes) -> bytes:
    """The same with every checksum and length made right, as far as the bytes go."""
    head_bytes = segments._SEGMENT.size
    vote_bytes = min(data[0] if data else 0, 20)
    body = data[1:].ljust(head_bytes + vote_bytes, b"\0")
    _, _, _, _, _, next_index, oldest, before, term, _ = segments._SEGMENT.unpack_from(body)
    length = head_bytes + vote_bytes + 4
    vote_length = vote_bytes if vote_bytes else segments.NO_VOTE
    head = segments._SEGMENT.pack(segments.SEGMENT_MAGIC, segments.FORMAT_VERSION, length, 1, CLUSTER, next_index,
                                  oldest % 3, before, term, vote_length)  # fmt: skip
    head += body[head_bytes : head_bytes + vote_bytes]
    out = head + crc32c(head).to_bytes(4, "little")
    rest = body[head_bytes + vote_bytes :]
    while rest:
        count, rest = rest[0] % 4 + 1, rest[1:]
        records = b""
        for _ in range(count):
            tail, rest = rest[:21].ljust(21, b"\0"), rest[21:]
            size, kind, index, term = segments._TAIL.unpack(tail)
            payload, rest = rest[: size % 40], rest[size % 40 :]
            records += segments.encode_record(kind % 8, index, term, payload)
        out += segments.encode_batch_header(1, len(out), len(records), count) + records
    return out


def recover_mended_segment(data: bytes) -> None:
    recover_segment(mend_segment(data))


def segment_seed() -> bytes:
    header = segments.SegmentHeader(1, CLUSTER, 1, 1, 0, 3, "n1").encode()
    records = b"".join(
        segments.encode_record(*each)
        for each in ((segments.Kind.ENTRY, 1, 1, b"one"), (segments.Kind.ENTRY, 2, 1, BOMB),
                     (segments.Kind.TERM, 1, 4, b"n2"), (segments.Kind.CUT, 2, 0), (segments.Kind.HEAD, 1, 1))
    )  # fmt: skip
    return header + segments.encode_batch_header(1, len(header), len(records), 5) + records


# --- snapshots and the ledger -------------------------------------------------------------------------------------


class OneFile:
    """A directory that holds one snapshot."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def make_directory(self, path: str) -> None: ...

    def list(self, directory: str) -> list[str]:
        return []

    def exists(self, path: str) -> bool:
        return True

    def read(self, path: str) -> bytes:
        return self._data


def load_snapshot(data: bytes) -> None:
    SnapshotStore("/s", files=cast(Any, OneFile(data))).load()


def load_mended_snapshot(data: bytes) -> None:
    """The right checksums about any state, up to the ledger that has to take it."""
    header = SnapshotHeader(CLUSTER, 5, 1, len(data), crc32c(data))
    load = SnapshotStore("/s", files=cast(Any, OneFile(header.encode() + data))).load()
    assert load is not None
    Ledger(1).restore(load.state)


def restore_mended_ledger(data: bytes) -> None:
    ledger = Ledger(1)
    ledger.restore(seal_snapshot(data))


def ledger_seed() -> bytes:
    ledger = Ledger(1)
    for index, command in enumerate(COMMANDS, 1):
        ledger.apply_proposal(index, Proposal(1, index, (command,)))
    return ledger.snapshot()


def apply_payload(data: bytes) -> None:
    """What stands in the journal is applied by every replica: it must not raise at all."""
    Ledger(1).apply(1, data)


COMMANDS: Final = (
    Join("n1", 1, 4000, True, ""),
    Advance("n1", 500),
    AllocateIds(100),
    Claim(1, Ids(((1, 10),), (b"k" * 16,))),
    Settle(1, (Settlement(4, Ids(((1, 5),)), Result.DONE),)),
    Testify("n1", 1, (Testimony(4, Ids(((6, 2),)), Fact.FINISHED),)),
)
PROPOSALS: Final = tuple(encode_proposal(Proposal(7, at, (each,))) for at, each in enumerate(COMMANDS, 1))

# --- tasks --------------------------------------------------------------------------------------------------------

BATCH: Final = TaskBatch(
    queue="q", handler="shop.charge", ids=Ids(((5, 2),)), bodies=(b'{"a":1}', b'{"b":[1,2]}'), ttr_ms=5, due_ms=99,
    submitted_ms=1_700_000_000_000, submitted_by="me",
)  # fmt: skip
KEYED: Final = TaskBatch(queue="q", handler="h", ids=Ids(keys=(b"k" * 16,)), bodies=(b"{}",), keys=("key",))
TASK_TEXT: Final = (
    b'{"handler":"h","body":{"x":"\\ud83d"},"key":"k","due":"2026-01-31T12:00:00Z","ttr_ms":5,'
    b'"traceparent":"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}'
)


def read_and_write_batch(data: bytes) -> None:
    """What is read out of the log may be put back into it (a retry, a dead letter)."""
    batch = decode_batch(data)
    assert decode_batch(encode_batch(batch)).ids == batch.ids


def read_and_write_task(data: bytes) -> None:
    message = validate_message(data)
    if message.id is not None:
        for batch in batches_of([message]):
            assert decode_task(encode_task(batch)).ids == batch.ids


class Posted:
    """As much of a request as the readers look at."""

    def __init__(self, data: bytes, content_type: str = "application/json") -> None:
        self._data, self.content_type = data, content_type
        self.headers = {"User-Agent": "fuzz"}
        self.remote = "127.0.0.1"

    async def read(self) -> bytes:
        return self._data


def finish(work: Coroutine[Any, Any, object]) -> None:
    try:
        work.send(None)
    except StopIteration:
        return
    raise AssertionError("it waits for something")


def submit_json(data: bytes) -> None:
    messages, _ = _messages(cast(Any, Posted(data)), data, {})
    write_out(messages)


def submit_lines(data: bytes) -> None:
    messages, _ = _messages(cast(Any, Posted(data, "application/x-ndjson")), data, {})
    write_out(messages)


def write_out(messages: Iterable[Any]) -> None:
    # What was accepted must reach the log: an error here would be a fault of the node, and no answer.
    for batch in batches_of([each for each in messages if each.id is not None]):
        decode_batch(encode_batch(batch))


def post_ids(data: bytes) -> None:
    finish(parse(cast(Any, Posted(data)), WantedIds))


def post_ruling(data: bytes) -> None:
    finish(parse(cast(Any, Posted(data)), Ruling))


# --- the work journal ---------------------------------------------------------------------------------------------

BOOT: Final = "b" * 32
MANIFEST_OF_ONE: Final = Manifest(1, 7, BOOT, ("slot",))


def work_file(entries: Iterable[bytes], data: bytes) -> bytes:
    size = layout.DATA_AT + len(data)
    file = bytearray(size)
    header = layout.pack_header(size, 7, BOOT)
    file[: len(header)] = header
    for number, entry in enumerate(entries):
        at = layout.ENTRIES_AT + layout.ENTRY_BYTES * number
        file[at : at + 8 + len(entry)] = (1).to_bytes(8, "little") + entry
    file[layout.DATA_AT :] = data
    return bytes(file)


def weigh_entries(data: bytes, *, mend: bool) -> None:
    """One entry a 32 bytes of the first half; the second half is the data area."""
    size = layout.ENTRY.size
    half = min(len(data) // 2 // size, 50) * size
    area = data[half:]
    entries = []
    for at in range(0, half, size):
        fence, mode, data_at, runs, keys, count, crc = layout.ENTRY.unpack_from(data, at)
        if mend:
            data_at = layout.DATA_AT + data_at % (len(area) + 1)
            mode, runs, keys, count = int(Mode.RUN), runs % 3, keys % 3, count % 9
            states_at = data_at + layout.RUN.size * runs + layout.KEY_BYTES * keys - layout.DATA_AT
            crc = layout.entry_crc(
                fence, mode, data_at, runs, keys, count, area[data_at - layout.DATA_AT : states_at]
            )
        entries.append(layout.ENTRY.pack(fence, mode, data_at, runs, keys, count, crc))
    weigh(MANIFEST_OF_ONE, BOOT, lambda name: work_file(entries, area))


def weigh_any(data: bytes) -> None:
    weigh(MANIFEST_OF_ONE, BOOT, lambda name: data)


def weigh_seed() -> bytes:
    packed = layout.pack_ids(Ids(((5, 2),), (b"k" * 16,)))
    entry = layout.ENTRY.pack(9, int(Mode.RUN), layout.DATA_AT, 1, 1, 3,
                              layout.entry_crc(9, int(Mode.RUN), layout.DATA_AT, 1, 1, 3, packed))  # fmt: skip
    return entry + packed + b"\x00\x01\x02"


WORK_DIR: Final = Path(tempfile.mkdtemp(prefix="oncekeeper-fuzz-"))
atexit.register(shutil.rmtree, WORK_DIR, ignore_errors=True)


def read_manifest(data: bytes) -> None:
    directory = WORK_DIR / "7"
    directory.mkdir(exist_ok=True)
    (directory / MANIFEST).write_bytes(data)
    read_testimony(WORK_DIR, 7, wait_s=0)


# --- all ----------------------------------------------------------------------------------------------------------

_JSON_TRAPS: Final = (
    DEEP, b'{"a":' * 5000, b"\xff", b'{"handler":"\xff","body":{}}', b'{"handler":"h","body":{"a":"\xff"}}',
    json.dumps({"handler": "h", "body": {}, "due": "9999-12-31T23:59:59.999-23:59"}).encode(),
    json.dumps({"handler": "h", "body": {}, "submitted": "9999-12-31T23:59:59.999-23:59", "id": "4"}).encode(),
    b'{"handler":"h","body":{},"key":"\\ud800"}', b'{"handler":"h","body":{},"due":"1970-01-01T00:00:00+23:59"}',
    b'{"handler":"h","body":{},"ttr_ms":' + b"9" * 5000 + b"}",
    b'{"handler":"h","body":{},"id":"' + b"9" * 5000 + b'"}',
)  # fmt: skip
_TASKS: Final = (encode_task(BATCH.part(0, 1)), encode_task(KEYED), TASK_TEXT, *_JSON_TRAPS)


def _frame(message: wire.Message) -> bytes:
    return wire.encode(message)


TARGETS: Final[dict[str, Target]] = {
    "frames": Target(
        read_frames, (wire.Malformed,), (b"".join(map(_frame, MESSAGES)), b"\xff\xff\xff\xff\x01", BOMB)
    ),
    "message": Target(
        wire.decode, (wire.Malformed,), (*(_frame(each)[5:] for each in MESSAGES), DEEP_PACK, BOMB)
    ),
    "handshake": Target(
        wire.decode_handshake, (wire.Malformed,), (*(wire.encode(each)[5:] for each in HANDSHAKES), DEEP_PACK)
    ),
    "worker-frames": Target(
        read_worker_frames, (frames.BrokenFrame,), (bytes(frames.encode(frames.Stop())), b"\xff" * 8)
    ),
    "certificate-names": Target(
        read_certificate_names, (TlsRefused,), (b"oncekeeper://" + b"c" * 32 + b"/n1", b"oncekeeper:///")
    ),
    "proposal": Target(decode_proposal, (CodecError,), (*PROPOSALS, b"\x01" + DEEP_PACK, BOMB)),
    "apply": Target(apply_payload, (), (*PROPOSALS, b"\x01" + DEEP_PACK, BOMB)),
    "journal": Target(recover_segment, (JournalError, OSError), (segment_seed(), BOMB)),
    "journal-mended": Target(
        recover_mended_segment, (JournalError, OSError), (b"\x02" + segment_seed(), bytes(200), b"\xff" * 300)
    ),
    "snapshot": Target(
        load_snapshot, (SnapshotError,),
        (SnapshotHeader(CLUSTER, 1, 1, 3, crc32c(b"abc")).encode() + b"abc", BOMB),
    ),
    "snapshot-mended": Target(load_mended_snapshot, (CodecError,), (ledger_seed(), BOMB)),
    "snapshot-envelope": Target(open_snapshot, (CodecError,), (seal_snapshot(b"x" * 50), BOMB)),
    "ledger": Target(restore_mended_ledger, (CodecError,), (open_snapshot(ledger_seed()), DEEP_PACK, BOMB)),
    "task": Target(read_and_write_task, (InvalidTask,), _TASKS),
    "batch": Target(read_and_write_batch, (InvalidTask,), (encode_batch(BATCH), encode_batch(KEYED), *_JSON_TRAPS)),
    "submit": Target(
        submit_json, (ApiError,),
        (*_TASKS, b'{"tasks":[' + TASK_TEXT + b"]}", b'{"tasks":' + DEEP, b'{"tasks":"\xff"}'),
    ),
    "submit-lines": Target(submit_lines, (ApiError,), (*_TASKS, TASK_TEXT + b"\n" + TASK_TEXT)),
    "post-ids": Target(
        post_ids, (ApiError,), (b'{"count":5}', DEEP, b'{"count":"\xff"}', b'{"\xff":1}', b'{"a":' + DEEP)
    ),
    "post-ruling": Target(
        post_ruling, (ApiError,),
        (b'{"ids":["1"],"verdict":"executed","by":"me"}', DEEP, b'{"by":"\xff"}', b'{"a":' + DEEP),
    ),
    "testimony": Target(
        lambda data: weigh_entries(data, mend=False), (), (weigh_seed(), struct.pack("<QIIIIII", 1, 1, 0, 2**32 - 1,
        2**32 - 1, 2**32 - 1, 0) * 2),
    ),
    "testimony-mended": Target(lambda data: weigh_entries(data, mend=True), (), (weigh_seed(), b"\xff" * 200)),
    "testimony-file": Target(weigh_any, (), (work_file([], b""), BOMB)),
    "manifest": Target(
        read_manifest, (), (msgspec.json.encode(MANIFEST_OF_ONE), DEEP, b'{"boot_id":"\xff"}')
    ),
}  # fmt: skip
