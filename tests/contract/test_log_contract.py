"""The suite of the port on the logs of one machine; tests/kafka runs it on Kafka."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from oncekeeper.log.embedded import open_log
from oncekeeper.log.memory import MemoryLog
from oncekeeper.log.port import TaskLog

pytest.register_assert_rewrite("tests.support.log_suite")

from tests.support.log_suite import *  # noqa: E402, F403
from tests.support.log_suite import Clock, Traits  # noqa: E402


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def traits() -> Traits:
    return Traits()


@pytest.fixture(params=["embedded", "memory"])
def log(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Iterator[TaskLog]:
    makers: dict[str, Callable[[], TaskLog]] = {
        "embedded": lambda: open_log(tmp_path / "tasks.db", create=True, partitions=4, clock_ms=clock),
        "memory": lambda: MemoryLog(4, clock),
    }
    log = makers[request.param]()
    yield log
    log.close()
