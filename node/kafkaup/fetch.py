"""Where Kafka's jars are, and how they get there: one's own, else the cache's, else from Maven, once.

Nothing but the standard library, and nothing of this project is imported: ``tools/get-kafka`` runs this file
alone, before there is an environment. A broker is a Java program; all that is needed of Kafka are its jars.

The cache is filled in a directory beside it that is renamed when it is whole: a fetch that was interrupted leaves
nothing that looks like one, and of two at the same time the later one throws its own away.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

VERSION = "4.3.0"
SCALA = "2.13"
SLF4J_VERSION = "1.7.36"  # the one that Kafka's own slf4j-api is of: a newer binding does not fit
PLUGIN = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies"
VERSION_MIN = (4, 0)  # the consumer group protocol of KIP-848 is on by default since then
JAVA_MIN = 17
VARIABLES = ("ONCEKEEPER_KAFKA", "KAFKA_HOME")
FETCH_S_MAX = 900
# Without any of these a broker does not start; a registry was seen that lacked one of a release.
NEEDED = (
    f"kafka_{SCALA}-{VERSION}.jar",
    f"kafka-server-{VERSION}.jar",
    f"kafka-tools-api-{VERSION}.jar",
    f"slf4j-simple-{SLF4J_VERSION}.jar",
)
POM = f"""<?xml version="1.0" encoding="UTF-8"?>
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>oncekeeper</groupId>
  <artifactId>kafka-jars</artifactId>
  <version>1</version>
  <packaging>pom</packaging>
  <dependencies>
    <dependency>
      <groupId>org.apache.kafka</groupId><artifactId>kafka_{SCALA}</artifactId><version>{VERSION}</version>
    </dependency>
    <dependency>
      <groupId>org.slf4j</groupId><artifactId>slf4j-simple</artifactId><version>{SLF4J_VERSION}</version>
    </dependency>
  </dependencies>
</project>
"""


class NoKafka(Exception):
    """There are no jars, or nothing to run or get them with; the message says what to do."""


def cache_path() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "oncekeeper" / f"kafka-{VERSION}"


def get_jars(say: Callable[[str], None]) -> Path:
    """The directory of the jars, fetched if they are nowhere. ``say`` is told what takes long. Raises NoKafka."""
    return find_jars() or _fetch(say)


def find_jars() -> Path | None:
    """The environment's, else the cache's; raises NoKafka for a variable that names nothing of use."""
    for variable in VARIABLES:
        if named := os.environ.get(variable):
            return _named_jars(variable, Path(named))
    cached = cache_path() / "lib"
    return cached if _release(cached) else None


def _named_jars(variable: str, home: Path) -> Path:
    for folder in (home / "libs", home / "lib", home):
        if release := _release(folder):
            if release < VERSION_MIN:
                raise NoKafka(
                    f"{variable}={home} is Kafka {'.'.join(map(str, release))}, and this needs "
                    f"{'.'.join(map(str, VERSION_MIN))} or newer: name another one, or unset {variable} to have "
                    f"{VERSION} fetched"
                )
            return folder.absolute()
    raise NoKafka(
        f"{variable}={home} holds no Kafka: there is no kafka_{SCALA}-….jar in its libs/ or lib/. Name the "
        f"directory that Kafka was unpacked to, or unset {variable} to have {VERSION} fetched"
    )


def _release(folder: Path) -> tuple[int, ...]:
    """Which Kafka's jars these are; () if none's."""
    for jar in sorted(folder.glob("kafka_2.*.jar")):
        if found := re.fullmatch(r"kafka_2\.\d+-(\d+)\.(\d+)\.\d[\w.-]*\.jar", jar.name):
            return int(found[1]), int(found[2])
    return ()


def find_java() -> str:
    """The program to run a broker with. Raises NoKafka."""
    home = os.environ.get("JAVA_HOME")
    program = shutil.which("java", path=str(Path(home) / "bin")) if home else shutil.which("java")
    if program is None:
        where = f"in JAVA_HOME={home}" if home else "on PATH"
        raise NoKafka(
            f"there is no Java {where}, and a Kafka broker is a Java program: install Java {JAVA_MIN} or newer "
            "(Debian and Ubuntu: apt-get install openjdk-17-jre-headless)"
        )
    said = subprocess.run([program, "-version"], capture_output=True, text=True, check=False)
    found = re.search(r'version "(?:1\.)?(\d+)', said.stderr + said.stdout)
    if found is None:
        raise NoKafka(f"{program} does not say which Java it is: {(said.stderr + said.stdout).strip()[:200]}")
    if int(found[1]) < JAVA_MIN:
        raise NoKafka(
            f"{program} is Java {found[1]}, and Kafka needs {JAVA_MIN} or newer; name another one in JAVA_HOME"
        )
    return program


def _fetch(say: Callable[[str], None]) -> Path:
    cache = cache_path()
    maven = shutil.which("mvn")
    if maven is None:
        raise NoKafka(
            f"there is no Kafka in {cache}, and no Maven (mvn) on PATH to get it with: install Maven (Debian and "
            "Ubuntu: apt-get install maven), or unpack Kafka from https://kafka.apache.org/downloads and name its "
            f"directory in {VARIABLES[0]}"
        )
    find_java()  # Maven needs it too, and says so less clearly
    say(f"getting Kafka {VERSION} into {cache} (once, 44 MB) ...")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{cache.name}-", dir=cache.parent))
    except OSError as error:
        raise NoKafka(
            f"{cache.parent} cannot be written: {error.strerror}; XDG_CACHE_HOME names another"
        ) from error
    try:
        _copy_dependencies(maven, beside)
        beside.chmod(0o755)
        try:
            beside.rename(cache)
        except OSError:
            if not _release(cache / "lib"):  # else somebody was faster, and theirs is as good
                raise
    except OSError as error:
        raise NoKafka(f"{cache} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return cache / "lib"


def _copy_dependencies(maven: str, folder: Path) -> None:
    (folder / "pom.xml").write_text(POM, "utf-8")
    command = [maven, "-q", "-B", "-f", str(folder / "pom.xml"), PLUGIN, "-DincludeScope=runtime"]
    command.append(f"-DoutputDirectory={folder / 'lib'}")
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=FETCH_S_MAX)
    except subprocess.TimeoutExpired:
        raise NoKafka(
            f"Maven did not get Kafka {VERSION} within {FETCH_S_MAX} s; is the network there?"
        ) from None
    if ran.returncode:
        said = (ran.stdout + ran.stderr).strip().splitlines()
        raise NoKafka("\n  ".join([f"Maven could not get Kafka {VERSION}:", *said[:12]]))
    if missing := [name for name in NEEDED if not (folder / "lib" / name).exists()]:
        raise NoKafka(f"Maven got Kafka {VERSION} without {', '.join(missing)}: the registry is incomplete")


def main() -> int:
    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        find_java()
        jars = get_jars(say)
    except NoKafka as error:
        say(str(error))
        return 2
    print(jars)
    return 0


if __name__ == "__main__":
    sys.exit(main())
