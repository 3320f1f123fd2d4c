"""One node: ``python -m node --config FILE``. Ends with 0 after a graceful stop, 2 on what trying
again would not mend: a bad configuration, or data that is damaged, foreign or of a newer format.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from node.cluster import ClusterError, Locked, hold_lock, read_secret
from node.config import ConfigError, NodeConfig, load_config
from node.supervisor import EXIT_BAD_CONFIG, EXIT_LOCKED, die_with


def parse_flags(pairs: list[str]) -> dict[str, str]:
    flags: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set {pair}: must be KEY=VALUE")
        flags[name] = value
    return flags


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m node", description="Run one node of a cluster.")
    parser.add_argument("--config", required=True, type=Path, help="the node's TOML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides the file")
    parser.add_argument("--die-with", type=int, default=0, metavar="PID", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.die_with:
        die_with(asked.die_with, signal.SIGKILL)
    try:
        return run(asked.config, asked.set)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    except Locked as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_LOCKED
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG if isinstance(error, Unfit) else 1


def run(path: Path, pairs: list[str]) -> int:
    """Raises ConfigError, Locked (the node is running already), or ClusterError (its data cannot be used)."""
    config = load_config(path, parse_flags(pairs))
    read_secret(config.cluster_dir)
    config.data_dir.mkdir(parents=True, exist_ok=True)
    # Held for the life of the process: two processes of one node would share a journal, and ruin it.
    with hold_lock(config.data_dir / "node.lock", f"node {config.node_id}"):
        return _run_loop(config)


class Unfit(ClusterError):
    """Data that is damaged, of another cluster or of a newer format: trying again would not mend it."""


def _run_loop(config: NodeConfig) -> int:
    from node.assembly import run_node
    from node.records_file import HistoryUnusable
    from oncekeeper.errors import LogUnusable
    from raft.journal_recovery import JournalDamaged, JournalRefused
    from raft.snapshots import SnapshotDamaged, SnapshotGap, SnapshotRefused
    from raft.store import StoreLost

    try:
        return _run_on_best_loop(run_node(config))
    except (LogUnusable, HistoryUnusable) as error:
        # A full disk is one of its reasons, so the supervisor tries again.
        raise ClusterError(str(error)) from error
    except (JournalRefused, SnapshotRefused) as error:
        raise Unfit(str(error)) from error
    except (JournalDamaged, SnapshotDamaged, SnapshotGap, StoreLost) as error:
        # Only in a cluster of one: else the store is moved aside, and its peers have everything.
        raise Unfit(str(error)) from error


def _run_on_best_loop(work: Coroutine[Any, Any, int]) -> int:
    try:
        import uvloop
    except ImportError:
        import asyncio

        return asyncio.run(work)
    return uvloop.run(work)


if __name__ == "__main__":
    sys.exit(main())
