"""A node that joined reads the work journals of its former lives, and says what node/testify.py makes of them."""

from __future__ import annotations

import logging

from node.parts import EvidencePart
from node.proposer import Proposer
from node.testify import lives, testimonies
from raft.commands import Testify
from raft.ledger import Ledger

_log = logging.getLogger("oncekeeper.node")


class Testifying:
    def __init__(
        self, node: str, process_life: int, evidence: EvidencePart, ledger: Ledger, proposer: Proposer
    ) -> None:
        """``process_life``: the incarnation under which this process began to write journals."""
        self._node = node
        self._process_life = process_life
        self._evidence = evidence
        self._ledger = ledger
        self._proposer = proposer

    async def speak(self, incarnation: int) -> None:
        """Say what the journals of former lives know, and forget journals that nothing asks for any more."""
        suspects = [
            run for run in self._ledger.suspects_of(self._node) if run.suspect.incarnation < incarnation
        ]
        evidence = self._evidence
        kept = [life for life in evidence.lives() if life != self._process_life]
        read = {}
        for claimed, life in lives(suspects, evidence.lives()).items():
            if life == self._process_life:
                continue  # joined anew without a restart: our own pools report it, and no former life knows of it
            read[claimed] = await evidence.read(life)
            if read[claimed].why:
                _log.warning("the work journals of incarnation %d: %s", life, read[claimed].why)
        for batch in testimonies(suspects, read):
            await self._proposer.propose((Testify(self._node, incarnation, batch),))
        for life in kept:
            evidence.forget(life)
