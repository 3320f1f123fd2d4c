"""Delayed tasks and schedules under faults, on the embedded log: tests/support/delay_faults_suite.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("tests.support.delay_faults_suite")

from tests.support.delay_faults_suite import *  # noqa: E402, F403
from tests.support.delay_stage import APP, Stage, staged  # noqa: E402
from tests.support.real_cluster import RealCluster  # noqa: E402


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("faults")
    with staged(RealCluster(folder, app=APP), folder) as running:
        yield running
