"""Where this project holds on to PySyncObj: its version, its private names, its clock.

PySyncObj 0.3.17 keeps Raft's core (election, the commit rule of figure 8, a leader's no-op) and is mended by
overriding private methods. Such a hold is only as good as the exact version behind it, so ``check_library`` refuses
any other, and any build from which a name that we use is missing.

``LibraryCore`` gives the private fields that the engine works with plain names, in one place. The library reads a
clock that is global to its module; ``LibraryCore.on_own_clock`` lends it the engine's injected clock for the length
of a call, so that a simulation can give each node a clock of its own. Outside such calls the library sees the real
one. All of it is for a single thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol

import pysyncobj
import pysyncobj.syncobj as library
from pysyncobj import SyncObj, SyncObjConf
from pysyncobj.node import Node
from pysyncobj.transport import Transport
from pysyncobj.version import VERSION

from raft.wire import Message, Vote, VoteRequest

LIBRARY_VERSION: Final = "0.3.17"

OVERRIDDEN: Final = (
    "_applyCommand",
    "_checkCommandsToApply",
    "_doDestroy",
    "addNodeToCluster",
    "removeNodeFromCluster",
    "setCodeVersion",
    "transferLeadership",
    "_addNodeToCluster",
    "_removeNodeFromCluster",
    "_setCodeVersion",
    "_transferLeadership",
    "_SyncObj__applyLogEntries",
    "_SyncObj__changeCluster",
    "_SyncObj__doApplyCommand",
    "_SyncObj__doChangeCluster",
    "_SyncObj__generateRaftTimeout",
    "_SyncObj__loadDumpFile",
    "_SyncObj__onBecomeLeader",
    "_SyncObj__onMessageReceived",
    "_SyncObj__sendAppendEntries",
    "_SyncObj__sendNextNodeIdx",
    "_SyncObj__tryLogCompaction",
)
"""Methods replaced by the engine. Each must exist in the library, or the replacement would never be called."""

CALLED: Final = (
    "_onTick",
    "_SyncObj__connectedToAnyone",
    "_SyncObj__onNodeConnected",
    "_SyncObj__onNodeDisconnected",
    "_SyncObj__onReadonlyNodeConnected",
    "_SyncObj__onReadonlyNodeDisconnected",
    "_SyncObj__setCurrentTerm",
    "_SyncObj__setState",
)
FIELDS: Final = (
    "_SyncObj__raftLog",
    "_SyncObj__raftState",
    "_SyncObj__raftCurrentTerm",
    "_SyncObj__votedForNodeId",
    "_SyncObj__raftLeader",
    "_SyncObj__raftElectionDeadline",
    "_SyncObj__raftCommitIndex",
    "_SyncObj__raftLastApplied",
    "_SyncObj__raftNextIndex",
    "_SyncObj__raftMatchIndex",
    "_SyncObj__lastResponseTime",
    "_SyncObj__leaderCommitIndex",
    "_SyncObj__needLoadDumpFile",
    "_SyncObj__newAppendEntriesTime",
    "_SyncObj__otherNodes",
    "_SyncObj__readonlyNodes",
    "_SyncObj__connectedNodes",
    "_SyncObj__startTime",
)

FOLLOWER: Final = 0
CANDIDATE: Final = 1
LEADER: Final = 2


class UnfitLibrary(Exception):
    """The installed PySyncObj is not the one that the engine was written against."""


def check_library(cls: type[Any] = SyncObj, version: str = VERSION) -> None:
    """Raise UnfitLibrary unless version and every overridden or called name are as expected."""
    if version != LIBRARY_VERSION:
        raise UnfitLibrary(
            f"pysyncobj {version} is installed, but raft/engine.py overrides private methods of exactly "
            f"{LIBRARY_VERSION}: install pysyncobj=={LIBRARY_VERSION}"
        )
    missing = [name for name in OVERRIDDEN + CALLED if not callable(getattr(cls, name, None))]
    if missing:
        raise UnfitLibrary(
            f"pysyncobj {version} at {pysyncobj.__file__} lacks {', '.join(missing)}: it was altered; reinstall it"
        )


def check_fields(instance: object) -> None:
    """The same for the fields that the library's constructor sets."""
    missing = [name for name in FIELDS if not hasattr(instance, name)]
    if missing:
        raise UnfitLibrary(f"pysyncobj at {pysyncobj.__file__} sets no {', '.join(missing)}: reinstall it")


_library_clock: Final[Callable[[], float]] = library.monotonicTime
_clock: Callable[[], float] = _library_clock


def _lent_clock() -> float:
    return _clock()


library.monotonicTime = _lent_clock


class Journal(Protocol):
    """The library's journal, and ``sync``. Items are (command, index, term)."""

    def add(self, command: bytes, idx: int, term: int) -> None: ...
    def clear(self) -> None: ...
    def deleteEntriesFrom(self, entryFrom: int) -> None: ...
    def deleteEntriesTo(self, entryTo: int) -> None: ...
    def __getitem__(self, item: Any) -> Any: ...
    def __len__(self) -> int: ...
    def sync(self) -> None: ...
    def setCurrentTerm(self, term: int, votedForNodeId: str | None) -> None: ...
    def getCurrentTerm(self) -> int: ...
    def getVotedForNodeId(self) -> str | None: ...
    def setRaftCommitIndex(self, raftCommitIndex: int) -> None: ...
    def getRaftCommitIndex(self) -> int: ...
    def onOneSecondTimer(self) -> None: ...
    def finish_rejoining(self) -> None: ...
    def _destroy(self) -> None: ...


class Outbox(Transport):  # type: ignore[misc]  # the library has no types
    """Carries the two messages that the library's own code still sends; all others are the engine's."""

    def __init__(self, send: Callable[[str, Message], bool]) -> None:
        super().__init__(None, None, ())
        self._send_message = send

    def send(self, node: Node, message: dict[str, Any]) -> bool:
        kind = message["type"]
        if kind == "request_vote":
            wire: Message = VoteRequest(message["term"], message["last_log_index"], message["last_log_term"])
        elif kind == "response_vote":
            wire = Vote(message["term"])
        else:
            raise UnfitLibrary(f"the library sends a {kind!r}, which the engine should have replaced")
        return self._send_message(node.id, wire)


class _NoPoller:
    """The engine waits for nothing: its host has the event loop."""

    def poll(self, timeout: float) -> None:
        pass


class LibraryCore(SyncObj):  # type: ignore[misc]  # the library has no types
    """A SyncObj without thread, socket, file or poller, whose fields have names."""

    def __init__(
        self,
        node: Node | None,
        others: list[Node],
        journal: Journal,
        send: Callable[[str, Message], bool],
        clock: Callable[[], float],
        conf: dict[str, Any],
    ) -> None:
        check_library()
        self.clock = clock
        with self.on_own_clock():
            # appendEntriesUseBatch on: otherwise the library opens a pipe to wake its poller.
            settings = SyncObjConf(
                autoTick=False,
                appendEntriesUseBatch=True,
                dynamicMembershipChange=False,
                pollerType="poll",
                **conf,
            )
            super().__init__(node, others, settings, transport=Outbox(send))
        check_fields(self)
        self._poller = _NoPoller()
        # Its dump file is never used: snapshots are the engine's (defects 2, 6, 14).
        self._SyncObj__needLoadDumpFile = False
        self._SyncObj__raftLog = journal

    @contextmanager
    def on_own_clock(self) -> Iterator[None]:
        global _clock
        before, _clock = _clock, self.clock
        try:
            yield
        finally:
            _clock = before

    # --- the library's fields by name. Getters only read during its constructor's dir() walk, hence the defaults.

    @property
    def log(self) -> Journal:
        journal: Journal = self._SyncObj__raftLog
        return journal

    @property
    def term(self) -> int:
        return int(self._SyncObj__raftCurrentTerm)

    @property
    def is_leader(self) -> bool:
        return bool(self._SyncObj__raftState == LEADER)

    @property
    def leader(self) -> Node | None:
        return self._SyncObj__raftLeader

    @leader.setter
    def leader(self, node: Node | None) -> None:
        self._SyncObj__raftLeader = node

    @property
    def election_deadline(self) -> float:
        return float(self._SyncObj__raftElectionDeadline)

    @election_deadline.setter
    def election_deadline(self, at: float) -> None:
        self._SyncObj__raftElectionDeadline = at

    @property
    def commit_index(self) -> int:
        return int(self._SyncObj__raftCommitIndex)

    @commit_index.setter
    def commit_index(self, index: int) -> None:
        self._SyncObj__raftCommitIndex = index
        self._SyncObj__raftLog.setRaftCommitIndex(index)

    @property
    def applied_index(self) -> int:
        return int(self._SyncObj__raftLastApplied)

    @applied_index.setter
    def applied_index(self, index: int) -> None:
        self._SyncObj__raftLastApplied = index

    @property
    def last_index(self) -> int:
        return int(self._SyncObj__raftLog[-1][1])

    @property
    def last_term(self) -> int:
        return int(self._SyncObj__raftLog[-1][2])

    @property
    def first_index(self) -> int:
        """The oldest entry kept; its term is known, its command may be covered by a snapshot."""
        return int(self._SyncObj__raftLog[0][1])

    def entry_term(self, index: int) -> int:
        return int(self._SyncObj__raftLog[index - self.first_index][2])
