"""The code keeps to the shape that docs/architecture.md draws; and the judge sees planted violations."""

from pathlib import Path

import pytest

from tests.support.imports import MAY_IMPORT, PACKAGES, PURE, sources, violations

ROOT = Path(__file__).resolve().parents[2]


def test_imports_point_one_way_pure_modules_are_pure_and_nothing_is_unpickled():
    assert violations(ROOT) == []


def test_every_package_was_looked_at():
    seen = {path.relative_to(ROOT).parts[0] for path in sources(ROOT)}
    assert seen >= set(PACKAGES) - {"chaos"}  # chaos is empty until its issue
    assert set(MAY_IMPORT) == set(PACKAGES)


def test_every_pattern_of_pure_modules_names_a_file():
    assert [pattern for pattern in PURE if not list(ROOT.glob(pattern))] == []


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("raft/journal.py", "import oncekeeper.envelope", "raft may import of this project: dedup"),
        (
            "oncekeeper/client.py",
            "from raft.commands import Claim",
            "oncekeeper may import of this project: dedup",
        ),
        ("dedup/bloom.py", "def f():\n    import node.offsets", "dedup may import of this project: nothing"),
        (
            "oncekeeper/app.py",
            "import importlib\nimportlib.import_module('node.config')",
            "may import of this project",
        ),
        (
            "node/service.py",
            "import chaos.faults",
            "node may import of this project: dedup, oncekeeper, raft",
        ),
        ("raft/ledger_claims.py", "import time", "is pure and imports time"),
        ("raft/ledger.py", "from random import random", "is pure and imports random"),
        ("node/coordinator.py", "import asyncio", "is pure and imports asyncio"),
        ("node/offsets.py", "from node.service import Service", "not on the list of pure ones"),
        ("node/why.py", "import datetime\nnow = datetime.datetime.now()", "reads a clock"),
        ("dedup/ids.py", "text = open('x').read()", "calls open()"),
        ("raft/replica.py", "from pysyncobj import SyncObj", "only raft/engine*.py may"),
        ("node/workers/frames.py", "import pickle", "nothing is ever unpickled"),
        ("raft/wire.py", "from marshal import loads", "nothing is ever unpickled"),
    ],
)
def test_a_planted_violation_is_seen(tmp_path, file, text, said):
    planted = tmp_path / file
    planted.parent.mkdir(parents=True)
    planted.write_text(text + "\n")
    assert any(said in wrong and file.rpartition("/")[2] in wrong for wrong in violations(tmp_path))


def test_what_is_allowed_is_not_a_violation(tmp_path):
    for file, text in {
        "raft/engine.py": "import pysyncobj",
        "raft/replica.py": "import asyncio\nfrom dedup.ids import Ids",
        "node/offsets.py": "from bisect import bisect\nfrom dedup.ids import Ids",
        "dedup/ids.py": "import hashlib",
        "oncekeeper/app.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import node.service",
    }.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text + "\n")
    assert violations(tmp_path) == []
