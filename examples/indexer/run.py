"""Index the standard library on three nodes, kill two of them meanwhile, and compare with a plain serial loop.

    python examples/indexer/run.py [--files N] [--dir DIR] [--json]

Ends with 0 if every file was indexed exactly once and every row equals the serial loop's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
COMMAND = [sys.executable, "-P", "-c", "from node.cli import main; main()"]
PROGRESS_S_MAX = 120.0

Row = Mapping[str, str | int]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=0, help="so many files, drawn at random; default: all")
    parser.add_argument("--seed", type=int, default=1, help="of the draw")
    parser.add_argument("--dir", type=Path, help="keep everything there; default: a temporary directory")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    asked = parser.parse_args()
    with _home(asked.dir) as home:
        verdict = run(home, asked.files, asked.seed, say=_silent if asked.json else print)
    if asked.json:
        print(json.dumps(verdict))
    else:
        for name, value in verdict.items():
            print(f"{name:<10} {value}")
        print(
            "\nequal to the serial loop, file by file"
            if verdict["equal"]
            else "\nNOT equal to the serial loop"
        )
    return 0 if verdict["equal"] else 1


@contextmanager
def _home(named: Path | None) -> Iterator[Path]:
    if named is None:
        with tempfile.TemporaryDirectory(prefix="indexer-") as made:
            yield Path(made)
        return
    if named.exists() and any(named.iterdir()):
        sys.exit(f"error: --dir {named} must be new or empty: what is found there is counted")
    named.mkdir(parents=True, exist_ok=True)
    yield named.absolute()


def _silent(*_: object) -> None:
    pass


def run(home: Path, count: int, seed: int, say: Any) -> dict[str, object]:
    # Read when indexer.py is imported: here, and in the workers, which inherit our environment.
    os.environ["INDEXER_RESULTS"] = str(home / "index.db")
    os.environ["ONCEKEEPER_CLUSTER"] = str(home / "cluster")
    sys.path.insert(0, str(HERE))
    from indexer import index, library_files

    paths = library_files()
    if count:
        paths = sorted(random.Random(seed).sample(paths, min(count, len(paths))))
    began = time.monotonic()
    _oncekeeper("cluster", "up", "--detach", "--app", "indexer:app", "--app-dir", str(HERE))
    try:
        index.submit_many([(path,) for path in paths], keys=paths)
        say(f"submitted {len(paths):,} files, one task each, with the path as key")
        _until_indexed(home, len(paths) // 4)
        say(_kill(leader=False))
        _until_indexed(home, len(paths) // 2)
        say(_kill(leader=True))
        index.submit_many([(path,) for path in paths], keys=paths)
        say("submitted all of them again, under the same keys")
        counts = _oncekeeper("wait", "--idle", "--timeout", "300")["tasks"]
        wall_s = time.monotonic() - began
    finally:
        _oncekeeper("cluster", "down")
    return _verdict(home, paths, counts, wall_s)


def _verdict(home: Path, paths: Sequence[str], counts: Mapping[str, int], wall_s: float) -> dict[str, object]:
    """From the database alone: nothing here asks the cluster for its opinion of the rows."""
    from indexer import examine

    found = _rows(home)
    times = Counter(row["path"] for row in found)
    by_path = {row["path"]: row for row in found}
    lost = [path for path in paths if not times[path]]
    twice = [path for path, rows in times.items() if rows > 1]
    differ = [path for path in paths if path in by_path and by_path[path] != examine(path)]
    return {
        "files": len(paths),
        "rows": len(found),
        "lost": len(lost),
        "twice": len(twice),
        "differ": len(differ),
        "suspects": counts["suspect"],
        "dead": counts["dead"],
        "wall_s": round(wall_s, 1),
        "equal": len(found) == len(paths)
        and not (lost or twice or differ or counts["suspect"] or counts["dead"]),
    }


def _rows(home: Path) -> list[Row]:
    with closing(sqlite3.connect(home / "index.db", timeout=30)) as database:
        database.row_factory = sqlite3.Row
        rows: list[dict[str, str | int]] = [
            dict(row) for row in database.execute("SELECT * FROM files ORDER BY row")
        ]
    for row in rows:
        del row["row"]
    return list(rows)


def _indexed(home: Path) -> int:
    try:
        with closing(sqlite3.connect(f"file:{home / 'index.db'}?mode=ro", uri=True, timeout=30)) as database:
            return int(database.execute("SELECT count(*) FROM files").fetchone()[0])
    except sqlite3.OperationalError:
        return 0  # no worker has made it yet


def _until_indexed(home: Path, wanted: int) -> None:
    deadline = time.monotonic() + PROGRESS_S_MAX
    while (found := _indexed(home)) < wanted:
        if time.monotonic() > deadline:
            sys.exit(f"error: {found} files are indexed after {PROGRESS_S_MAX:g} s, waited for {wanted}")
        time.sleep(0.02)


def _kill(leader: bool) -> str:
    """SIGKILL to a node; the supervisor starts it again."""
    rows = _oncekeeper("nodes")["nodes"]
    row = next(row for row in rows if row.get("up") and (row["role"] == "leader") == leader)
    os.kill(row["pid"], signal.SIGKILL)
    return f"killed {row['node']}, {'the leader' if leader else 'a follower'}, with SIGKILL"


def _oncekeeper(*arguments: str) -> Any:
    ran = subprocess.run([*COMMAND, *arguments, "--json"], stdout=subprocess.PIPE, check=False)
    answer = json.loads(ran.stdout)
    if ran.returncode:
        sys.exit(f"error: oncekeeper {' '.join(arguments)}: {answer.get('error')}")
    return answer


if __name__ == "__main__":
    sys.exit(main())
