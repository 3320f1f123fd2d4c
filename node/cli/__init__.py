"""The command line. Its contract (commands, ``--json``, exit codes) is what scripts rely on.

Exit codes: 0 done, 1 failed, 2 bad usage, 3 cluster unreachable (and 130, interrupted). With ``--json``
exactly one JSON document goes to standard output, ``{"error": …}`` included; whatever is for people goes to
standard error then.

A command like ``status`` is typed often and put into loops, so what it does not need is not imported:
modules of this package import rich, asyncio and the rest of the product inside their functions.
"""

from __future__ import annotations

import sys


def main() -> None:
    from node.cli.program import run

    sys.exit(run(sys.argv[1:]))
