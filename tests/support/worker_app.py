"""An application whose handlers misbehave in every way that a worker must survive."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import stat
import subprocess
import sys
import time

from node.workers.frames import Reported, encode
from node.workers.port import Ended, Part, Report
from oncekeeper import App
from oncekeeper.context import current_task
from oncekeeper.errors import AlreadyExecuted, SecondTransaction

app = App("bad")


def record(path: str, what: str) -> None:
    """The effect, outside of the system: one line, appended at once."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(fd, f"{what}\n".encode())
    os.close(fd)


def descriptors() -> list[int]:
    """All but the standard three. Our socket's number is the one it had in the parent, who may have many open."""
    return [fd for fd in map(int, os.listdir("/proc/self/fd")) if fd > 2]


def write_to_sockets(data: bytes) -> None:
    for fd in descriptors():
        try:
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                os.write(fd, data)
        except OSError:
            continue  # it was the listing's own, and is closed


@app.task(kind="cpu", on_doubt="rerun")
def nothing() -> None:
    return None


@app.task(kind="cpu")
def double(n: int) -> int:
    return 2 * n


@app.task(kind="cpu")
def odd_raises(n: int) -> int | None:
    if n % 2:
        raise ValueError(f"{n} is odd")
    return None


@app.task(kind="cpu")
def leave(how: str) -> None:
    if how == "SystemExit":
        sys.exit(7)
    if how == "KeyboardInterrupt":
        raise KeyboardInterrupt
    if how == "_exit":
        os._exit(5)
    if how == "segfault":
        ctypes.string_at(0)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "close":
        os.closerange(3, max(descriptors()) + 1)
    if how in ("scribble", "lie"):
        report = Report(999, (Part(0, 1, Ended.DONE),), 0, 0, 0, 0)
        write_to_sockets(b"\xff\xff\xff\xff" if how == "scribble" else encode(Reported((report,))))
        time.sleep(600)
    if how == "done":
        raise AlreadyExecuted("it stands already")
    if how == "second":
        raise SecondTransaction("one mark cannot tell of two")


@app.task(kind="io")
def leave_io(how: str) -> None:
    if how == "second":
        raise SecondTransaction("one mark cannot tell of two")


@app.task(kind="cpu")
def effect(path: str, n: int, die_at: int = -1, pause_s: float = 0.0) -> None:
    record(path, str(n))
    if n == die_at:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(pause_s)


@app.task(kind="cpu", ttr=0.3)
def hold_interpreter(path: str) -> None:
    record(path, str(os.getpid()))
    # One call into C that does not give the interpreter away.
    sum(range(10**13))


@app.task(kind="cpu", ttr=600)
def hold_interpreter_long(path: str) -> None:
    record(path, str(os.getpid()))
    sum(range(10**13))


@app.task(kind="cpu", ttr=60)
def hog(mebibytes: int, at_once: bool = False) -> None:
    held = [bytearray(mebibytes << 20)] if at_once else []
    for _ in range(0 if at_once else mebibytes):
        held.append(bytearray(b"x") * (1 << 20))
        time.sleep(0.001)
    time.sleep(60)


@app.task(kind="cpu")
def chatter(lines: int) -> None:
    print("to standard output")
    print("to standard error", file=sys.stderr)
    os.write(1, b"raw \x00\xff bytes\n")
    for n in range(lines):
        print("flood", n)


@app.task(kind="cpu")
def giant(size: int) -> str:
    return "x" * size


@app.task(kind="cpu")
def no_json() -> object:
    return object()


@app.task(kind="cpu", ttr=0.5)
def spawn_child(path: str) -> None:
    child = subprocess.Popen(["sleep", "600"])
    record(path, str(child.pid))
    time.sleep(600)


@app.task(kind="cpu")
def which() -> tuple[str, int, int]:
    task = current_task()
    return task.id_text, task.fence, task.attempt


@app.task(kind="io", ttr=30)
def meet(path: str, others: int) -> int:
    """Returns only if ``others`` tasks run at the same time."""
    record(path, "here")
    while True:
        with open(path) as file:
            seen = len(file.readlines())
        if seen >= others:
            return seen
        time.sleep(0.005)


@app.task(kind="io", ttr=0.4)
def hang() -> None:
    time.sleep(600)


@app.task(kind="io")
def nap(path: str, pause_s: float) -> str:
    record(path, "asleep")
    time.sleep(pause_s)
    return os.getcwd()


@app.task(kind="io")
async def meet_async(path: str, others: int) -> int:
    record(path, "here")
    while True:
        with open(path) as file:
            seen = len(file.readlines())
        if seen >= others:
            return seen
        await asyncio.sleep(0.005)


@app.task(kind="io", ttr=0.3)
async def hang_async(path: str, wait_s: float) -> None:
    def act() -> None:
        time.sleep(wait_s)
        record(path, "an effect of a thread that nobody can cancel")

    await asyncio.to_thread(act)


@app.task(kind="io")
async def nap_async(pause_s: float) -> None:
    await asyncio.sleep(pause_s)


@app.task(kind="io")
async def giant_async(size: int) -> str:
    return "x" * size


@app.task(kind="io")
async def async_which() -> str:
    await asyncio.sleep(0)
    return current_task().id_text


@app.task(kind="io", on_doubt="check")
def checked(answer: str) -> None:
    return None


@checked.check
def was_checked(answer: str) -> bool | None:
    if answer == "raise":
        raise RuntimeError("the database is away")
    if answer == "die":
        os._exit(9)
    if answer == "id":
        return current_task().id == 77 and current_task().fence == 5
    return {"yes": True, "no": False}.get(answer)
