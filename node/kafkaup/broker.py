"""Kafka brokers of one directory: made, started, looked at, killed, stopped and started again.

A broker is combined with its controller (KRaft) and is a Java process. What starts it is a few lines of Python that
take the flock on the broker's lock file, write their pid into it, and then *become* Java: the lock is Java's own
for as long as it lives, so that whether a broker runs is asked of the kernel, from any process, and nobody is ever
found by name (``node.cluster`` says the same of nodes).

An attached broker dies with the process that started it, however that ends: the kernel kills it. That signal
follows the starting *thread*, so each broker is started by a thread of its own, which waits for its end.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Self

from msgspec.structs import replace

from node.cluster import Locked, hold_lock, is_held, lock_holder, port_is_free, signal_holder
from node.kafkaup.fetch import NoKafka, find_java, get_jars
from node.kafkaup.layout import (
    CONTROLLER,
    FILE,
    PLAIN,
    BrokerPlan,
    KafkaError,
    Plan,
    TlsFiles,
    make_plan,
    properties,
    read_plan,
    with_port,
    write_plan,
)
from node.kafkaup.probe import NoAnswer, alive_brokers

HEAP_MB = {1: 256, 3: 192}  # by how many there are
START_S_MAX = 90.0
STOP_S_MAX = 20.0
FORMAT_S_MAX = 90.0
POLL_S = 0.05
EXIT_LOCKED = 75
EXIT_ASKED = (0, 143)  # 143: by SIGTERM, as Java says it
SAID_LINES = 12
BECOME = """
import ctypes, fcntl, os, sys, time
lock, parent, *command = sys.argv[1:]
file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
for attempt in range(101):
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        break
    except BlockingIOError:  # a broker's, or for a moment of somebody who asks whether it is held
        if attempt == 100:
            sys.exit(75)
        time.sleep(0.01)
os.ftruncate(file, 0)
os.pwrite(file, b"%d\\n" % os.getpid(), 0)
os.set_inheritable(file, True)
if int(parent):
    ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL
    if os.getppid() != int(parent):
        sys.exit(1)
os.execv(command[0], command)
"""


class BrokerEnded(KafkaError):
    """It ended instead of getting ready."""


class Broker:
    def __init__(self, directory: Path, number: int, plan: Callable[[], Plan]) -> None:
        self.number = number
        self.dir = directory / f"b{number}"
        self.lock = self.dir / "broker.lock"
        self.log = self.dir / "broker.log"
        self.data = self.dir / "data"
        self._plan = plan
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def plan(self) -> BrokerPlan:
        return self._plan().brokers[self.number]

    @property
    def up(self) -> bool:
        """Its process lives; whether it answers is another question."""
        return is_held(self.lock)

    @property
    def pid(self) -> int:
        """0: it does not run."""
        return lock_holder(self.lock)

    @property
    def rss_bytes(self) -> int:
        try:
            pages = int(Path(f"/proc/{self.pid}/statm").read_text("ascii").split()[1])
        except OSError:
            return 0
        return pages * os.sysconf("SC_PAGE_SIZE")

    @property
    def exit_code(self) -> int | None:
        """Of a broker that this process started and that ended."""
        return None if self._process is None else self._process.poll()

    def port(self, listener: str = PLAIN) -> int:
        """The port that a client of this listener dials: the proxy's, where one was put in front of it."""
        return self.plan.advertised.get(listener, self.plan.ports[listener])

    def alive(self) -> set[int]:
        """The brokers that this one knows to be alive; empty if it does not answer."""
        try:
            return alive_brokers(self.plan.ports[PLAIN])
        except NoAnswer:
            return set()

    # --- start ---

    def start(self, *, attached: bool = True, wait: bool = True, timeout_s: float = START_S_MAX) -> None:
        """``wait``: until it answers, and counts itself among the living. Raises KafkaError."""
        if self.up:
            raise Locked(
                f"broker {self.number} is running already as process {self.pid} (it holds {self.lock})"
            )
        java, jars = _java_and_jars()
        for name, port in self.plan.ports.items():
            if not port_is_free(port, udp=False):
                raise KafkaError(
                    f"port {port} (listener {name} of broker {self.number}) is taken by another process: "
                    "stop that, or choose another port: --port PORT"
                )
        format_brokers([self])
        self.write_properties()
        self._spawn(_kafka(java, jars, HEAP_MB[len(self._plan().brokers)], self._properties), attached)
        if wait:
            self.wait_ready({self.number}, timeout_s)

    def write_properties(self) -> None:
        self.dir.mkdir(parents=True, exist_ok=True)
        file = os.open(self._properties, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(file, "w", encoding="ascii") as out:
            out.write(properties(self._plan(), self.number, self.data))

    def format_arguments(self) -> list[str]:
        """Of Kafka's storage tool: who the cluster is, and who its first controllers are."""
        plan = self._plan()
        first = [
            f"{number}@127.0.0.1:{each.ports[CONTROLLER]}:{each.directory_id}"
            for number, each in plan.brokers.items()
        ]
        return ["-t", plan.cluster_id, "-c", str(self._properties), "--initial-controllers", ",".join(first)]

    @property
    def _properties(self) -> Path:
        return self.dir / "server.properties"

    def _spawn(self, command: list[str], attached: bool) -> None:
        parent = os.getpid() if attached else 0
        command = [sys.executable, "-I", "-S", "-c", BECOME, str(self.lock), str(parent), *command]
        started = threading.Event()
        failed: list[OSError] = []

        def stand_by() -> None:
            try:
                # Its output to a file, not to a pipe: nobody may be there to read it.
                with self.log.open("ab") as out:
                    self._process = subprocess.Popen(
                        command,
                        cwd=self.dir,
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=out,
                        start_new_session=True,  # Ctrl-C at the terminal is not for it
                    )
            except OSError as error:
                failed.append(error)
                return
            finally:
                started.set()
            self._process.wait()

        threading.Thread(target=stand_by, name=f"kafka-broker-{self.number}", daemon=True).start()
        started.wait()
        if failed:
            raise KafkaError(f"broker {self.number} cannot be started: {failed[0]}")

    def wait_ready(self, brokers: Iterable[int], timeout_s: float = START_S_MAX) -> None:
        """Until it answers and knows these to be alive. Raises BrokerEnded or KafkaError."""
        wanted = set(brokers)
        deadline = time.monotonic() + timeout_s
        while True:
            # Its end first: what answers at its port could be another's.
            if self.exit_code == EXIT_LOCKED:
                raise Locked(f"broker {self.number} is running already as process {self.pid}")
            if self.exit_code is not None:
                raise BrokerEnded(
                    f"broker {self.number} ended with {self.exit_code}. It said:\n{self.said()}"
                )
            found = self.alive()
            if wanted <= found:
                return
            if time.monotonic() > deadline:
                knows = f"knows of {sorted(found)} only" if found else "does not answer"
                raise KafkaError(f"broker {self.number} {knows} after {timeout_s:g} s; see {self.log}")
            time.sleep(POLL_S)

    def said(self) -> str:
        """The end of its log, without what is only a stack."""
        try:
            text = self.log.read_bytes()[-20_000:].decode("utf-8", "replace")
        except OSError:
            return "  (nothing)"
        lines = [
            line for line in text.splitlines() if line.strip() and not re.match(r"\s+at |\s+\.\.\. ", line)
        ]
        return "\n".join("  " + line[:300] for line in lines[-SAID_LINES:]) or "  (nothing)"

    # --- end ---

    def kill(self) -> None:
        """As a power switch for this process, and wait until it is gone."""
        self.signal(signal.SIGKILL)
        if not self.wait_gone(STOP_S_MAX):
            raise KafkaError(f"broker {self.number} is still there after SIGKILL (a hung disk?)")

    def abandon(self) -> None:
        """Kill it if it is one that this process started; another's is left alone."""
        if self._process is not None and self._process.poll() is None:
            self.kill()

    def stop(self, timeout_s: float = STOP_S_MAX) -> bool:
        """Ask it to shut down, then kill it. True: it ended by itself."""
        self.signal(signal.SIGTERM)
        if self.wait_gone(timeout_s):
            return True
        self.kill()
        return False

    def restart(self, *, attached: bool = True, timeout_s: float = START_S_MAX) -> None:
        self.stop()
        self.start(attached=attached, timeout_s=timeout_s)

    def signal(self, number: signal.Signals) -> None:
        """Also SIGSTOP and SIGCONT. Nothing happens if it does not run."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)
        else:
            signal_holder(self.lock, number)

    def wait_gone(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while self.up or (self._process is not None and self._process.poll() is None):
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True


class Kafka:
    """The one or three brokers of a directory."""

    def __init__(self, directory: Path, plan: Plan) -> None:
        self.dir = directory.absolute()
        self.plan = plan
        self.brokers = {number: Broker(self.dir, number, lambda: self.plan) for number in plan.brokers}

    @classmethod
    def create(
        cls,
        directory: Path,
        *,
        brokers: int = 1,
        port: int = 0,
        listeners: Iterable[str] = (),
        users: Mapping[str, str] | None = None,
        settings: Mapping[str, str] | None = None,
        tls: TlsFiles | None = None,
    ) -> Self:
        """``port`` 0: free ones. ``listeners``: PROXIED, SASL, TLS, SASL_TLS, beside PLAIN. Raises KafkaError."""
        if directory.exists() and not directory.is_dir():
            raise KafkaError(f"{directory}: is a file; name a directory")
        if directory.exists() and any(directory.iterdir()):
            raise KafkaError(f"{directory}: is not empty and holds no {FILE}; name a new or empty directory")
        if "," in str(directory.absolute()):
            raise KafkaError(
                f"{directory}: Kafka takes the comma for the end of a path; name another directory"
            )
        plan = make_plan(brokers, port, listeners, users or {}, settings or {}, tls)
        _java_and_jars()  # before anything is written
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise KafkaError(f"{directory}: cannot be made: {error.strerror}") from error
        write_plan(directory, plan)
        return cls(directory, plan)

    @classmethod
    def open(cls, directory: Path) -> Self:
        return cls(directory, read_plan(directory))

    def set_port(self, port: int) -> None:
        """Where clients of PLAIN connect, from the next start on."""
        self._change(with_port(self.plan, port))

    def advertise(self, listener: str, ports: Mapping[int, int]) -> None:
        """Send clients of a listener to another port, by broker (a proxy's), from the next start on."""
        brokers = dict(self.plan.brokers)
        for number, port in ports.items():
            advertised = brokers[number].advertised | {listener: port}
            brokers[number] = replace(brokers[number], advertised=advertised)
        self._change(replace(self.plan, brokers=brokers))

    def _change(self, plan: Plan) -> None:
        write_plan(self.dir, plan)
        self.plan = plan

    def bootstrap(self, listener: str = PLAIN) -> str:
        """``bootstrap.servers`` for a client of this listener."""
        return ",".join(f"127.0.0.1:{each.port(listener)}" for each in self.brokers.values())

    @property
    def running(self) -> list[Broker]:
        return [each for each in self.brokers.values() if each.up]

    def start(self, *, attached: bool = True, timeout_s: float = START_S_MAX) -> None:
        """Those that are down, and wait until all know of all. What was started is stopped again if that fails."""
        with hold_lock(self.dir / "starting.lock", f"another start of the brokers of {self.dir}"):
            down = [each for each in self.brokers.values() if not each.up]
            deadline = time.monotonic() + timeout_s
            try:
                format_brokers(down)
                for each in down:
                    each.start(attached=attached, wait=False)
                for each in self.brokers.values():
                    each.wait_ready(self.brokers, max(1.0, deadline - time.monotonic()))
            except BaseException:
                # Half a cluster in the background helps nobody; what failed is what gets reported.
                for each in down:
                    with contextlib.suppress(KafkaError):
                        each.abandon()
                raise

    def stop(self, timeout_s: float = STOP_S_MAX) -> list[int]:
        """Every broker, one after the other; the numbers of those that had to be killed."""
        killed = []
        for position, each in enumerate(self.brokers.values()):
            if not each.up:
                continue
            # A broker that shuts down asks the controllers to let it go, and waits for minutes if they are too few
            # to decide. What was written is in the kernel's hands: killing loses nothing.
            left = len(self.brokers) - position
            if left > len(self.brokers) // 2:
                if not each.stop(timeout_s):
                    killed.append(each.number)
            else:
                each.kill()
        return killed

    def kill(self) -> None:
        """All at the same time, as in a power cut."""
        for each in self.brokers.values():
            each.signal(signal.SIGKILL)
        for each in self.brokers.values():
            each.kill()


# --- Java -----------------------------------------------------------------------------------------


def _java_and_jars() -> tuple[str, Path]:
    try:
        return find_java(), get_jars(lambda text: print(text, file=sys.stderr, flush=True))
    except NoKafka as error:
        raise KafkaError(str(error)) from error


def _kafka(java: str, jars: Path, heap_mb: int, config: Path) -> list[str]:
    return [
        java,
        f"-Xmx{heap_mb}m",
        "-XX:+UseSerialGC",
        "-XX:+ExitOnOutOfMemoryError",  # rather an end that is seen than a broker that limps
        "-Djava.awt.headless=true",
        "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
        "-Dorg.slf4j.simpleLogger.showDateTime=true",
        "-Dorg.slf4j.simpleLogger.dateTimeFormat=HH:mm:ss.SSS",
        "-cp",
        f"{jars}/*",
        "kafka.Kafka",
        str(config),
    ]


def format_brokers(brokers: Iterable[Broker]) -> None:
    """Give the data directories that have none their identity; once in a broker's life. Raises KafkaError."""
    new = [each for each in brokers if not (each.data / "meta.properties").exists()]
    if not new:
        return
    java, jars = _java_and_jars()
    running = []
    for each in new:
        each.write_properties()
        running.append(subprocess.Popen(
            [java, "-Xmx128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1",
             "-Dorg.slf4j.simpleLogger.defaultLogLevel=error", "-cp", f"{jars}/*",
             "kafka.tools.StorageTool", "format", "--ignore-formatted", *each.format_arguments()],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ))  # fmt: skip
    for each, process in zip(new, running, strict=True):
        try:
            said, _ = process.communicate(timeout=FORMAT_S_MAX)
        except subprocess.TimeoutExpired:
            for late in running:
                late.kill()
            raise KafkaError(f"broker {each.number} cannot be formatted within {FORMAT_S_MAX:g} s") from None
        if process.returncode:
            raise KafkaError(f"broker {each.number} cannot be formatted: {said.strip()[-2000:]}")
