"""A worker process, started by node/workers/process.py.

Order matters at the start: first it makes sure to die with its parent, then it takes the lock of its journal (so
that no former holder of the slot lives), and only then it loads the application and says hello.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import io
import os
import resource
import signal
import socket
import sys
from collections.abc import Mapping
from typing import cast

import msgspec

from node.workers.calls import Calls, current_id, load_calls, one_line, short_trace
from node.workers.cpu import CpuRunner
from node.workers.frames import Down, Frames, Hello, Job, Reported, Stop, Up, encode
from node.workers.inout import InOutRunner
from node.workers.journal import WorkerJournal
from node.workers.port import Report

PR_SET_PDEATHSIG = 1
RECEIVE_BYTES = 256 * 1024
NO_APPLICATION = 3  # exit status
MARK, MARK_END = "\x1e", "\x1f"  # around the task id before each printed line


class Spec(msgspec.Struct, frozen=True):
    """What a worker is told on its command line."""

    app_ref: str
    app_dir: str
    threads: int
    async_tasks_max: int
    memory_bytes_max: int
    kind: str = ""  # "cpu" or "io"
    journal: str = ""
    fd: int = -1  # its end of the socket pair
    parent: int = 0


class TaggedOutput(io.TextIOWrapper):
    """Standard output and error: each line carries the id of the task that printed it."""

    _at_line_start = True

    def write(self, text: str) -> int:
        if self._at_line_start and text:
            task = current_id()
            if task:
                super().write(f"{MARK}{task}{MARK_END}")
        if text:
            self._at_line_start = text.endswith("\n")
        super().write(text)
        return len(text)


def die_with_parent(parent: int) -> None:
    """SIGKILL when the thread that started us ends; it is the main thread of the node (process.py sees to it)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os._exit(0)  # it was gone before we asked


def limit_memory(memory_bytes_max: int) -> None:
    """A brake for what grows faster than the node looks: well above the bound, allocation fails.

    Data, not address space: libraries map much that they never touch.
    """
    limit = 2 * memory_bytes_max + (512 << 20)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or hard > limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def redirect_output() -> None:
    for name, fd in (("stdout", 1), ("stderr", 2)):
        raw = io.FileIO(fd, "w", closefd=False)
        output = TaggedOutput(
            io.BufferedWriter(raw, 8192),
            "utf-8",
            "backslashreplace",
            line_buffering=True,
            write_through=False,
        )
        setattr(sys, name, output)


class CpuWorker:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._decode = msgspec.msgpack.Decoder(Down).decode

    def send(self, message: Up) -> None:
        self._sock.sendall(encode(message))

    def serve(self, handlers: Mapping[str, Calls], journal: WorkerJournal) -> None:
        runner = CpuRunner(handlers, journal, lambda report: self.send(Reported((report,))))
        frames = Frames()
        while data := self._sock.recv(RECEIVE_BYTES):
            for payload in frames.feed(data):
                message = self._decode(payload)
                if isinstance(message, Stop):
                    return
                runner.run(message)


class InOutWorker(asyncio.Protocol):
    """The socket's end on the event loop."""

    def __init__(self) -> None:
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.runner: InOutRunner | None = None
        self._frames = Frames()
        self._decode = msgspec.msgpack.Decoder(Down).decode
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from it

    def send(self, reports: tuple[Report, ...]) -> None:
        if self._transport is not None:
            self._transport.write(encode(Reported(reports)))

    def data_received(self, data: bytes) -> None:
        for payload in self._frames.feed(data):
            message = self._decode(payload)
            if isinstance(message, Job) and self.runner is not None:
                self.runner.submit(message)
            elif isinstance(message, Stop):
                self._close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            os._exit(1)  # the node is gone, or has given us up: nothing may be started any more
        if not self.lost.done():
            self.lost.set_result(None)

    async def hang_up(self) -> None:
        """Close, after what is still to be sent."""
        if self._transport is not None:
            self._transport.close()
            await self.lost

    def _close(self) -> None:
        if not self.closed.done():
            self.closed.set_result(None)


async def serve_inout(
    sock: socket.socket, handlers: Mapping[str, Calls], journal: WorkerJournal, spec: Spec
) -> None:
    loop = asyncio.get_running_loop()
    _, worker = await loop.create_unix_connection(InOutWorker, sock=sock)
    worker.runner = InOutRunner(handlers, journal, worker.send, spec.threads, spec.async_tasks_max)
    await worker.closed
    await worker.runner.drained()
    await worker.hang_up()


def main(text: str) -> None:
    spec = msgspec.json.decode(text, type=Spec)
    die_with_parent(spec.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at a terminal stops the node, which then drains us
    os.set_inheritable(spec.fd, False)
    sock = socket.socket(fileno=spec.fd)
    journal = WorkerJournal(spec.journal)
    limit_memory(spec.memory_bytes_max)
    try:
        handlers = load_calls(spec.app_ref, spec.app_dir)
    except BaseException as error:  # noqa: BLE001 - whatever the module raised: the node is told, and we leave
        text = f"{one_line(error)}\n{short_trace(error)}"
        sock.sendall(encode(Hello(os.getpid(), (), text)))
        os._exit(NO_APPLICATION)
    redirect_output()
    # What was imported lives for ever: the collector need not look at it again.
    gc.collect()
    gc.freeze()
    sock.sendall(encode(Hello(os.getpid(), tuple(calls.info for calls in handlers.values()))))
    if spec.kind == "cpu":
        with contextlib.suppress(OSError):  # the node is gone, or a handler closed our socket: leave
            CpuWorker(sock).serve(handlers, journal)
    else:
        asyncio.run(serve_inout(sock, handlers, journal, spec))
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    # Not by way of exit handlers: a handler's thread that does not end would hold us here.
    os._exit(0)
