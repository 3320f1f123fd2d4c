"""Where the Makefile runs a suite on several processes: which tests stay together, and which go first.

Tests of a file that share something (a cluster, made once) follow each other on one process. Every other test goes
wherever there is room, the slow ones first: else the last one would be waited for alone.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# A machine that is slow, or has other work, is no fault of what is tested.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

ROOT = Path(__file__).resolve().parents[1]
SHARES = re.compile(r'scope="(module|class|package)"|import \*')


@functools.cache
def stays_together(file: str) -> bool:
    return SHARES.search((ROOT / file).read_text("utf-8")) is not None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    from xdist.scheduler import LoadScopeScheduling

    class ByWhatIsShared(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if stays_together(file) else nodeid

    return ByWhatIsShared(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(key=goes_later)


def goes_later(item: pytest.Item) -> bool:
    return stays_together(item.nodeid.partition("::")[0]) or item.get_closest_marker("slow") is None
