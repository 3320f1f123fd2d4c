"""An empty store is a new one, or one that lost what it had: told apart also when its whole directory is gone."""

from __future__ import annotations

from pathlib import Path

import pytest

from raft.replica_config import ReplicaConfig
from raft.store import mark_initialised, open_store


def config(folder: Path, *, told: bool = True) -> ReplicaConfig:
    return ReplicaConfig(
        node_id="n2",
        cluster_id="0" * 32,
        secret=bytes(32),
        listen=("127.0.0.1", 1),
        peers={"n1": ("127.0.0.1", 2), "n3": ("127.0.0.1", 3)},
        data_dir=folder / "raft",
        unborn=folder / "unborn" if told else None,
    )


def may_vote(wanted: ReplicaConfig) -> bool:
    journal, _ = open_store(wanted)
    try:
        return not journal.rejoining
    finally:
        journal.close()


def test_a_replica_that_never_held_anything_may_vote(tmp_path: Path) -> None:
    (tmp_path / "unborn").touch()
    assert may_vote(config(tmp_path))
    assert may_vote(config(tmp_path))  # nothing was marked yet: a crash in the first moments


def test_a_replica_whose_whole_directory_is_gone_gives_no_vote(tmp_path: Path) -> None:
    # What was laid down when the cluster was made was removed when there was something to lose.
    assert not may_vote(config(tmp_path))
    assert not may_vote(config(tmp_path))


def test_nobody_who_was_told_nothing_is_held_back(tmp_path: Path) -> None:
    assert may_vote(config(tmp_path, told=False))


@pytest.mark.parametrize("marked", [False, True], ids=["at once", "after a crash between the two"])
def test_the_sign_of_the_unborn_goes_when_the_store_is_marked_as_used(tmp_path: Path, marked: bool) -> None:
    unborn = tmp_path / "unborn"
    unborn.touch()
    assert may_vote(config(tmp_path))
    if marked:
        mark_initialised(tmp_path / "raft")
    mark_initialised(tmp_path / "raft", unborn=unborn)
    assert not unborn.exists()
    assert (tmp_path / "raft" / "initialised").exists()
