"""The pytest plugin: fixtures for users' tests of their own handlers (docs/testing.md).

Everything is imported when a test asks for it: a test run that asks for nothing pays for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from chaos.testing.cluster import InMemoryCluster
    from chaos.testing.crashpoints import CrashPoints


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "oncekeeper(nodes=3): how many nodes the cluster of the fixture oncekeeper_cluster has"
    )


@pytest.fixture
def oncekeeper_cluster(request: pytest.FixtureRequest) -> Iterator[InMemoryCluster]:
    """A cluster in memory, under a virtual clock; the mark ``oncekeeper(nodes=5)`` gives it other than 3 nodes."""
    from chaos.testing.cluster import InMemoryCluster

    marker = request.node.get_closest_marker("oncekeeper")
    with InMemoryCluster(**(marker.kwargs if marker is not None else {})) as cluster:
        yield cluster


@pytest.fixture
def oncekeeper_crash_points() -> CrashPoints:
    """Kills a handler at each of its steps, and finds out whether its check tells the truth."""
    from chaos.testing.crashpoints import CrashPoints

    return CrashPoints()
