"""Java for the brokers of tests: the classes of a started broker archived once, so that the others map them.

A broker that runs for seconds spends most of them on loading, checking and compiling classes. Java takes an
archive of loaded classes (CDS, ``-XX:SharedArchiveFile``), and compiles more cheaply at ``TieredStopAtLevel=1``:
both together make a start take a third. An archive that does not fit, or is not there, is passed over.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from node.kafkaup.broker import Kafka, format_brokers
from node.kafkaup.fetch import cache_path, find_java, get_jars
from node.kafkaup.layout import KafkaError

VARIABLE = "JDK_JAVA_OPTIONS"  # what every `java` takes before its own options
CHEAP = "-XX:TieredStopAtLevel=1"
# No word about archives: what is said goes where a command's answer goes.
QUIET = "-Xlog:disable -Xlog:all=error:stderr"


def start_soon() -> None:
    """From now on, in this process and in those that it starts."""
    if VARIABLE in os.environ:
        return  # somebody knows better
    os.environ[VARIABLE] = f"{CHEAP} {QUIET}"
    if (archive := _archive()) is not None:
        os.environ[VARIABLE] += f" -XX:SharedArchiveFile={archive}"


def _archive() -> Path | None:
    folder = cache_path().parent
    path = folder / f"kafka-classes-{_fingerprint()}.jsa"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "kafka-classes.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # others may want it at the same moment
                if not path.exists():
                    _make(path)
        except OSError:
            return None  # a place that cannot be written
    return path if path.exists() else None


def _fingerprint() -> str:
    """Of what an archive is good for: this Java and these jars."""
    jars = get_jars(print)
    java = find_java()
    said = subprocess.run([java, "-version"], capture_output=True, text=True, check=True).stderr
    stats = [(jar.name, jar.stat().st_size, jar.stat().st_mtime_ns) for jar in sorted(jars.glob("*.jar"))]
    return hashlib.blake2b(repr((java, said, str(jars), stats)).encode(), digest_size=8).hexdigest()


def _make(path: Path) -> None:
    """A broker is started and stopped; Java writes the archive when it ends. Nothing is made if that fails."""
    options = os.environ[VARIABLE]
    directory = Path(tempfile.mkdtemp(prefix=".kafka-classes-", dir=path.parent))
    made = directory / "made.jsa"
    try:
        kafka = Kafka.create(directory / "kafka")
        format_brokers(kafka.brokers.values())
        os.environ[VARIABLE] = f"{options} -XX:ArchiveClassesAtExit={made}"
        kafka.start()
        os.environ[VARIABLE] = options
        if kafka.stop(60.0) == [] and made.exists():
            for former in path.parent.glob("kafka-classes-*.jsa"):
                former.unlink(missing_ok=True)
            made.rename(path)
    except KafkaError:
        return
    finally:
        os.environ[VARIABLE] = options
        shutil.rmtree(directory, ignore_errors=True)
