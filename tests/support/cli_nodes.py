"""Stand-ins for node processes: they hold the node's lock and do as they are told, and nothing else."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable

from node.cluster import Cluster

HOLD = """
    import signal, sys
    from pathlib import Path
    from node.cluster import hold_lock
    with hold_lock(Path(sys.argv[1]), "stand-in"):
"""
OBEDIENT = HOLD + "        signal.sigwait([signal.SIGTERM])\n"
STUBBORN = (
    HOLD + "        signal.signal(signal.SIGTERM, signal.SIG_IGN)\n        while True: signal.pause()\n"
)
HOPELESS = "import sys; sys.exit(2)"


def stand_in(source: str) -> Callable[[Cluster, str, int], list[str]]:
    # sigwait wants the signal blocked before it can arrive, that is before the lock tells that we are up.
    source = textwrap.dedent(source).replace(
        "with hold_lock",
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\nwith hold_lock"
        if "sigwait" in source
        else "with hold_lock",
    )
    return lambda cluster, node, die_with: [sys.executable, "-c", source, str(cluster.node_lock(node))]
