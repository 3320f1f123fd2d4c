"""A client in a process of its own: submits until it is killed, and prints what was acknowledged, line by line.

``python -m tests.support.real_submit DIRECTORY HANDLER... `` prints {"handler", "ids"} after each.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time

from dedup.ids import id_text
from oncekeeper.client import Client


def main() -> None:
    directory, *handlers = sys.argv[1:]
    client = Client(directory)
    for number, handler in enumerate(itertools.cycle(handlers)):
        bodies = [json.dumps({"name": f"s{os.getpid()}-{number}-{at}"}).encode() for at in range(20)]
        ids = client.send(f"real.{handler}", bodies)
        print(json.dumps({"handler": handler, "ids": [id_text(each) for each in ids]}), flush=True)
        time.sleep(0.01)


if __name__ == "__main__":
    main()
