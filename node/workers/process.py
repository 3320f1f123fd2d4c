"""One worker process as the node sees it: started, spoken with, listened to, killed, buried."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import cast

import msgspec

from node.workers.frames import BrokenFrame, Down, Frames, Hello, Reported, Up, encode
from node.workers.worker import MARK, MARK_END, Spec
from oncekeeper.envelope import UNDECODABLE

ROOT = Path(__file__).resolve().parents[2]
# Our own packages are found from wherever the worker runs: in the application's directory, so that relative paths
# of handlers mean the same under every node.
START = "import sys; sys.path[0] = sys.argv[1]; from node.workers.worker import main; main(sys.argv[2])"
LINE_BYTES_MAX = 8 * 1024
LINES_PER_S_MAX = 500
LAST_WORDS_S = 1.0  # how long a dead process's socket may take to deliver the rest
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Lines(asyncio.Protocol):
    """What a worker prints, cut into lines; a flood is counted instead of logged."""

    def __init__(self, on_line: Callable[[str, str], None]) -> None:
        self._on_line = on_line
        self._rest = b""
        self._second = 0
        self._left = LINES_PER_S_MAX
        self._dropped = 0

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LINE_BYTES_MAX:
            lines.append(self._rest)
            self._rest = b""
        for line in lines:
            self._take(line)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._rest:
            self._take(self._rest)
        self._say_dropped()

    def _take(self, line: bytes) -> None:
        loop = asyncio.get_running_loop()
        if int(loop.time()) != self._second:
            self._second, self._left = int(loop.time()), LINES_PER_S_MAX
        if self._left <= 0:
            if not self._dropped:
                loop.call_later(1.0, self._say_dropped)
            self._dropped += 1
            return
        self._left -= 1
        text = line[:LINE_BYTES_MAX].decode("utf-8", "backslashreplace")
        if text.startswith(MARK):
            task, _, text = text[1:].partition(MARK_END)
            self._on_line(task, text)
        else:
            self._on_line("", text)

    def _say_dropped(self) -> None:
        if self._dropped:
            self._on_line("", f"({self._dropped} lines were dropped)")
            self._dropped = 0


class WorkerProcess(asyncio.Protocol):
    """``on_end`` is called once, after all that the process still had to say was delivered."""

    def __init__(
        self,
        on_hello: Callable[[Hello], None],
        on_reports: Callable[[Reported], None],
        on_line: Callable[[str, str], None],
        on_exit: Callable[[int], None],
        on_end: Callable[[int], None],
    ) -> None:
        self.pid = 0
        self.killed_why = ""
        self._on_hello = on_hello
        self._on_reports = on_reports
        self._on_line = on_line
        self._on_exit = on_exit  # with the pid, while the number is still taken
        self._on_end = on_end
        self._frames = Frames()
        self._decode = msgspec.msgpack.Decoder(Up).decode
        self._out: list[bytearray] = []
        self._transport: asyncio.Transport | None = None
        self._output: asyncio.BaseTransport | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._hung_up = False
        self._buried = False
        self._loop = asyncio.get_running_loop()

    def spawn(self, spec: Spec) -> None:
        """Start the process. The parent-death signal follows the starting *thread*: it must be the main one."""
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                "workers must be started by the main thread: they die with the thread that did"
            )
        ours, theirs = socket.socketpair()
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        spec = msgspec.structs.replace(spec, fd=theirs.fileno(), parent=os.getpid())
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", START, str(ROOT), msgspec.json.encode(spec).decode()],
                cwd=spec.app_dir or None,
                stdin=subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                pass_fds=(theirs.fileno(),),
                process_group=0,  # it leads its own, so that what a handler spawns is killed with it
            )
        except BaseException:
            ours.close()
            os.close(read_end)
            raise
        finally:
            theirs.close()
            os.close(write_end)
        self.pid = self._process.pid
        self._pidfd = os.pidfd_open(self.pid)
        self._loop.add_reader(self._pidfd, self._exited)
        ours.setblocking(False)
        self._connecting = self._loop.create_task(self._connect(ours, read_end))

    async def _connect(self, ours: socket.socket, read_end: int) -> None:
        await self._loop.create_unix_connection(lambda: self, sock=ours)
        output = os.fdopen(read_end, "rb", buffering=0)
        self._output, _ = await self._loop.connect_read_pipe(lambda: Lines(self._on_line), output)

    # --- the socket --------------------------------------------------------------------------------------------

    def send(self, message: Down) -> None:
        """Frames of one turn of the loop leave in one write."""
        if not self._out:
            self._loop.call_soon(self._write)
        self._out.append(encode(message))

    def _write(self) -> None:
        if self._transport is None:
            if not self._buried:
                self._loop.call_later(0.005, self._write)  # the connection is made within a turn or two
            return
        if not self._transport.is_closing():
            self._transport.write(b"".join(self._out) if len(self._out) > 1 else self._out[0])
        self._out.clear()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from it

    def data_received(self, data: bytes) -> None:
        try:
            for payload in self._frames.feed(data):
                message = self._decode(payload)
                if isinstance(message, Hello):
                    self._on_hello(message)
                else:
                    self._on_reports(message)
        except (BrokenFrame, *UNDECODABLE) as error:
            self.kill(f"it broke the frame format: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._hung_up = True
        if self._process is not None and self._process.returncode is None:
            # Whether it is leaving or closed a descriptor that was not its own: nothing more can be heard of it.
            self._loop.call_later(LAST_WORDS_S, self.kill, "it closed its connection")
        else:
            self._bury()

    # --- the end -----------------------------------------------------------------------------------------------

    def kill(self, why: str) -> None:
        """SIGKILL, with all that it spawned. The first reason given is the one remembered."""
        if self._process is None or self._process.returncode is not None:
            return
        self.killed_why = self.killed_why or why
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def rss_bytes(self) -> int:
        try:
            with open(f"/proc/{self.pid}/statm", "rb") as file:
                return int(file.read().split()[1]) * PAGE_BYTES
        except (OSError, IndexError):
            return 0  # it is gone

    def _exited(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        # Before it is reaped, so that the number cannot mean anybody else.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._on_exit(self.pid)
        assert self._process is not None
        self._process.wait()
        if self._hung_up:
            self._bury()
        else:
            # What it sent before it died is still in the socket; the end of the stream comes after it.
            self._loop.call_later(LAST_WORDS_S, self._bury)

    def _bury(self) -> None:
        if self._buried:
            return
        self._buried = True
        if self._transport is not None:
            self._transport.abort()
        if self._output is not None:
            self._loop.call_later(LAST_WORDS_S, self._output.close)
        assert self._process is not None
        self._on_end(self._process.returncode or 0)
