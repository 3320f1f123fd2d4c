"""A client in a process of its own: submits until it is killed, and prints what was acknowledged, line by line.

``python -m tests.support.real_submit DIRECTORY HANDLER... `` prints {"handler", "ids", "acknowledged": false}
before each, and the same with true after it: killed in between, it may have stored the tasks.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from dedup.ids import TaskId, id_text, parse_id
from oncekeeper.client import Client


def main() -> None:
    directory, *handlers = sys.argv[1:]
    client = Client(directory)
    for number, handler in enumerate(itertools.cycle(handlers)):
        bodies = [json.dumps({"name": f"s{os.getpid()}-{number}-{at}"}).encode() for at in range(20)]
        ids = client._ids.take(len(bodies))
        told = {"handler": handler, "ids": [id_text(each) for each in ids]}
        print(json.dumps(told | {"acknowledged": False}), flush=True)
        client.send(f"real.{handler}", bodies, ids=ids)
        print(json.dumps(told | {"acknowledged": True}), flush=True)
        time.sleep(0.01)


def heard_of(said: Path) -> Iterator[tuple[str, list[TaskId], bool]]:
    """(handler, ids, whether they were acknowledged), line by line; the last one may have been cut off."""
    for line in said.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            told = json.loads(line)
            yield told["handler"], [parse_id(each) for each in told["ids"]], told["acknowledged"]


if __name__ == "__main__":
    main()
