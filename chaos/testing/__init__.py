"""What users test their own handlers with: a cluster in memory, and crashes at every point of a handler.

``InMemoryCluster`` is a whole cluster in one thread under a virtual clock. ``CrashPoints`` kills a handler at each
of its steps and finds out whether its check tells the truth. Both are pytest fixtures (chaos/pytest_plugin.py);
the documents are in docs/testing.md.
"""

from chaos.testing.cluster import InMemoryCluster
from chaos.testing.crashpoints import CrashPoints
from chaos.testing.report import CrashReport, Finding

__all__ = ["CrashPoints", "CrashReport", "Finding", "InMemoryCluster"]
