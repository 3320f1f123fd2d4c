"""The guard: a process of its own that kills a node's workers when the node's lease has run out.

A node that is paused (SIGSTOP, a stalled disk, an endless callback) cannot kill its workers, and a handler that
never releases the interpreter lock cannot be stopped from inside its own process: neither by a thread, nor by a
timer signal that such a thread would have to push forward while the lease is renewed. So the deadline is watched
from outside, by a process that shares nothing with either but one page of memory: the lease, and the process
groups to kill (each worker leads its own, so what a handler spawned goes with it).

It sleeps in poll() on a CLOCK_BOOTTIME timer and on a pipe from the node: a byte means "look again", the end of
the pipe means that the node is gone, and the workers must be too. It runs with the standard library alone.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import signal
import struct
import sys
import time

TABLE_BYTES = 4096
LEASE_AT = 0  # 0: no lease was given; nothing runs, and nothing is killed
GROUPS_AT = 8
GROUP_COUNT = (TABLE_BYTES - GROUPS_AT) // 4
CLOCK_BOOTTIME = 7
TFD_CLOEXEC = 0o2000000
TFD_TIMER_ABSTIME = 1
LEASE_NS_MAX = 2**62


def kill_groups(table: mmap.mmap) -> None:
    for (group,) in struct.iter_unpack("=I", table[GROUPS_AT : GROUPS_AT + 4 * GROUP_COUNT]):
        if group:
            try:
                os.killpg(group, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue  # it is gone already


def watch(path: str) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    table = mmap.mmap(fd, TABLE_BYTES)
    libc = ctypes.CDLL(None, use_errno=True)
    timer = libc.timerfd_create(CLOCK_BOOTTIME, TFD_CLOEXEC)
    if timer < 0:
        raise OSError(ctypes.get_errno(), "timerfd_create(CLOCK_BOOTTIME)")
    poll = select.poll()
    poll.register(0, select.POLLIN)
    poll.register(timer, select.POLLIN)
    killed_for = 0
    while True:
        lease = struct.unpack_from("=Q", table, LEASE_AT)[0]
        if lease and lease != killed_for and time.clock_gettime_ns(CLOCK_BOOTTIME) >= lease:
            kill_groups(table)
            # Once for each lease: workers that the node starts afterwards check the lease before each task.
            killed_for = lease
        at = min(lease, LEASE_NS_MAX) if lease != killed_for else 0
        spec = struct.pack("=qqqq", 0, 0, at // 10**9, at % 10**9)  # zero disarms
        libc.timerfd_settime(timer, TFD_TIMER_ABSTIME, spec, None)
        for ready, _ in poll.poll():
            if ready == timer:
                os.read(timer, 8)
            elif not os.read(0, 4096):
                kill_groups(table)
                return


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    watch(sys.argv[1])
