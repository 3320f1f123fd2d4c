"""One suite for every store of delayed tasks (tests/support/delayed_suite.py): those of one machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from oncekeeper.log.embedded import EmbeddedLog, open_log
from oncekeeper.log.memory import MemoryLog

pytest.register_assert_rewrite("tests.support.delayed_suite")

from tests.support.delayed_suite import *  # noqa: E402, F403
from tests.support.delayed_suite import Clock  # noqa: E402


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def copies() -> bool:
    return False


@pytest.fixture(params=["embedded", "embedded, all is far off", "memory"])
def log(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Iterator[EmbeddedLog | MemoryLog]:
    makers: dict[str, Callable[[], EmbeddedLog | MemoryLog]] = {
        "embedded": lambda: open_log(tmp_path / "tasks.db", create=True, partitions=4, clock_ms=clock),
        "embedded, all is far off": lambda: open_log(
            tmp_path / "tasks.db", create=True, partitions=4, clock_ms=lambda: 0
        ),
        "memory": lambda: MemoryLog(4, clock),
    }
    log = makers[request.param]()
    yield log
    log.close()
