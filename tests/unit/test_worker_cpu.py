"""The CPU worker's loop, on a journal in a file and without a process: what it reports and what it marks."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup.ids import Ids
from node.workers import cpu
from node.workers.calls import Calls, encode_result
from node.workers.cpu import CpuRunner
from node.workers.frames import BrokenFrame, Frames, Job, Stop, encode
from node.workers.journal import DATA_AT, Journal, State, WorkerJournal
from node.workers.port import Ended, HandlerInfo, Mode, Report, Work
from oncekeeper.context import CurrentTask
from oncekeeper.errors import AlreadyExecuted, SecondTransaction

INFO = HandlerInfo("t.act", "cpu", "short", False, 1000, 0, 0, 0, "hold", "default")
WANTED = {
    b"none": (Ended.DONE, State.FINISHED),
    b"value": (Ended.DONE, State.FINISHED),
    b"already": (Ended.DONE, State.FINISHED),
    b"unencodable": (Ended.DONE, State.FINISHED),
    b"raise": (Ended.RAISED, State.FAILED),
    b"exit": (Ended.RAISED, State.FAILED),
    b"second": (Ended.INVALID, State.FAILED),
    b"invalid": (Ended.INVALID, State.FAILED),
    b"lease": (Ended.NOT_STARTED, State.NOT_STARTED),
}


class Scripted:
    """A handler whose bodies say what it does."""

    def __init__(self, directory: Path) -> None:
        self.journal = Journal(directory / "one", 1, "boot", DATA_AT + 64 * 64)
        self.journal.set_lease(2**62)
        self.worker = WorkerJournal(str(directory / "one"))
        self.ran: list[tuple[int | bytes, int]] = []  # id, and the state byte while it ran
        self.reports: list[Report] = []
        calls = Calls(INFO, self.decode, self.act, lambda task, arguments: None, self.encode)
        self.runner = CpuRunner({"t.act": calls}, self.worker, self.reports.append)

    def run(self, bodies: list[bytes]) -> list[int]:
        ids = Ids(((100, len(bodies)),))
        record = self.journal.put(Mode.RUN, 7, ids, len(bodies))
        assert record is not None
        self.states = record.states
        work = Work(1, Mode.RUN, "t.act", ids, 7, 1, 0, tuple(bodies))
        self.runner.run(Job(record.entry, record.states_at, work))
        return list(record.states)

    def decode(self, body: bytes) -> bytes:
        if body == b"lease":
            raise AssertionError("nothing is decoded after the lease")
        if body == b"invalid":
            raise ValueError("it does not fit")
        return body

    def act(self, task: CurrentTask, body: bytes) -> object:
        assert isinstance(task.id, int)
        self.ran.append((task.id, self.states[task.id - 100]))
        if body == b"raise":
            raise ValueError("no")
        if body == b"exit":
            raise SystemExit(1)
        if body == b"second":
            raise SecondTransaction("one mark cannot tell of two")
        if body == b"already":
            raise AlreadyExecuted("yes")
        if body == b"end-lease":
            self.journal.set_lease(1)
        return {b"none": None, b"end-lease": None}.get(body, body.decode())

    def encode(self, value: object) -> bytes:
        if value == "unencodable":
            raise TypeError("no JSON")
        return f'"{value}"'.encode()


@settings(max_examples=150, deadline=None)
@given(
    bodies=st.lists(st.sampled_from([body for body in WANTED if body != b"lease"]), min_size=1, max_size=30),
    lease_ends_at=st.none() | st.integers(0, 29),
    flush_ns=st.sampled_from([0, cpu.FLUSH_NS]),
)
def test_every_position_is_reported_once_as_it_ended_and_marked_so(
    bodies: list[bytes], lease_ends_at: int | None, flush_ns: int
) -> None:
    if lease_ends_at is not None and lease_ends_at < len(bodies):
        # The task that is running when the lease ends is still told; the guard is what kills it.
        bodies[lease_ends_at] = b"end-lease"
        bodies[lease_ends_at + 1 :] = [b"lease"] * (len(bodies) - lease_ends_at - 1)
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "FLUSH_NS", flush_ns)
        it = Scripted(Path(directory))
        states = it.run(bodies)
    wanted = [WANTED.get(body, (Ended.DONE, State.FINISHED)) for body in bodies]
    assert states == [state for _, state in wanted]
    told: list[tuple[int, Ended, bytes | None]] = []
    for report in it.reports:
        for part in report.parts:
            results = part.results or (None,) * part.count
            assert len(results) == part.count
            told += [(part.at + n, part.ended, results[n]) for n in range(part.count)]
    assert [position for position, _, _ in told] == list(range(len(bodies))), "each once, in order"
    assert [ended for _, ended, _ in told] == [ended for ended, _ in wanted]
    for (_, _, result), body in zip(told, bodies, strict=True):
        assert result == b'"value"' if body == b"value" else result in (None, b"null")
    assert it.ran == [
        (100 + n, State.STARTED) for n, body in enumerate(bodies) if body not in (b"invalid", b"lease")
    ], "each ran with its start mark set"


def test_a_result_that_cannot_be_encoded_is_dropped_with_the_reason() -> None:
    def refuse(value: object) -> bytes:
        raise TypeError("no\nJSON")

    calls = Calls(INFO, bytes, lambda task, arguments: None, lambda task, arguments: None, refuse)
    assert encode_result(calls, object()) == (None, "the result was dropped: TypeError: no JSON")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=30))
def test_frames_come_out_whole_however_the_stream_is_cut(cuts: list[int]) -> None:
    one = bytes(encode(Stop()))
    stream, frames, found = one * 5, Frames(), []
    for cut in [*cuts, len(one) * 5]:
        found += list(frames.feed(stream[:cut]))
        stream = stream[cut:]
    assert found == [one[4:]] * 5


def test_a_frame_beyond_the_bound_is_refused_before_it_is_gathered() -> None:
    with pytest.raises(BrokenFrame, match="frame_bytes_max"):
        list(Frames().feed(b"\xff\xff\xff\xff"))
