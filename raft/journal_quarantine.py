"""Moving a damaged store aside, so that its node can come back as one that knows nothing and says so."""

from __future__ import annotations

import os

from raft.files import OS_FILES, Files
from raft.journal_recovery import MARK_NAME, REJOINING_NAME


def quarantine(directory: str | os.PathLike[str], files: Files = OS_FILES) -> str:
    """Move a damaged store's files aside, into a new folder below ``directory``, and return that folder's path.

    What is left is an empty store that ``Journal.open`` marks as ``rejoining``: the node has forgotten its votes,
    so it must not vote until it has caught up. The marker is made durable before the first file moves: a crash in
    between must not leave what looks like the store of a new node, which may vote. Safe to call again.
    """
    path = os.fspath(directory)
    marker = f"{path}/{REJOINING_NAME}"
    _write_durably(files, marker, b"moving\n")
    files.sync_directory(path)
    number = 1
    while files.exists(f"{path}/damaged-{number}"):
        number += 1
    aside = f"{path}/damaged-{number}"
    files.make_directory(aside)
    for name in files.list(path):
        if name == MARK_NAME or name.endswith((".segment", ".new")):
            files.rename(f"{path}/{name}", f"{aside}/{name}")
    files.sync_directory(aside)
    files.sync_directory(path)
    _write_durably(files, marker, b"empty\n")
    return aside


def _write_durably(files: Files, path: str, data: bytes) -> None:
    file = files.open(path, create=not files.exists(path))
    try:
        file.truncate(0)
        file.pwrite(data, 0)
        file.fsync()
    finally:
        file.close()
