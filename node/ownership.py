"""Which node reads which partition: rendezvous hashing with bounded loads.

Every node computes the same answer from the same live sessions of the ledger, so no message is needed. Plain
rendezvous hashing (Thaler and Ravishankar, 1998) gives twelve partitions to three nodes as 5, 2 and 5; the
bound of ceil(partitions / nodes) a node (Mirrokni, Thorup and Zadimoghaddam, 2018) makes it 4, 4 and 4 and moves
little more when a node comes or goes. A moment of disagreement, while one replica is behind another, costs a
claim that is refused and nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def owners(partitions: int, nodes: Iterable[str]) -> dict[int, str]:
    """The owner of each partition ``0 .. partitions - 1``; empty where there is no node."""
    loads = dict.fromkeys(sorted(nodes), 0)
    if not loads:
        return {}
    bound = -(-partitions // len(loads))
    chosen = {}
    for partition in range(partitions):
        free = (node for node, load in loads.items() if load < bound)
        node = max(free, key=lambda name: _weight(partition, name))
        loads[node] += 1
        chosen[partition] = node
    return chosen


def owned_by(node: str, partitions: int, nodes: Iterable[str]) -> frozenset[int]:
    """The partitions that ``node`` owns among ``nodes``."""
    return frozenset(p for p, name in owners(partitions, nodes).items() if name == node)


def _weight(partition: int, node: str) -> bytes:
    text = f"{partition}/{node}".encode()
    return hashlib.blake2b(text, digest_size=8, person=b"oncekeeper-own").digest()
