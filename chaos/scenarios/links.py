"""The Raft links of a cluster, each through a proxy of its own, and the shapes in which they are cut.

Of each pair one node dials (raft/transport.py): three nodes have three links. A node listens where cluster.json
says; what a node dials is told to it alone, by the peers of its own node.toml. Only Raft goes through the proxies:
clients, the HTTP API and the task log are not cut.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import combinations

from chaos.faults import Fault
from chaos.toxiproxy import DOWN, UP, Proxy, Toxiproxy
from node.cluster import Cluster


class Links:
    def __init__(self, cluster: Cluster, server: Toxiproxy) -> None:
        self.proxies: dict[tuple[str, str], Proxy] = {}
        for acceptor, dialler in combinations(sorted(cluster.peers), 2):
            name = f"{dialler}-{acceptor}"
            self.proxies[dialler, acceptor] = server.proxy(name, str(cluster.peers[acceptor].raft))
        for node in cluster.peers:
            self._tell(cluster, node)

    def _tell(self, cluster: Cluster, node: str) -> None:
        lines = []
        for name, peer in cluster.peers.items():
            proxy = self.proxies.get((node, name))
            lines += [
                f"[peers.{name}]",
                f"raft = {json.dumps(proxy.listen if proxy else str(peer.raft))}",
                f"http = {json.dumps(str(peer.http))}",
                f"wake = {peer.wake}",
            ]
        with cluster.config_path(node).open("a") as file:
            file.write("\n".join(lines) + "\n")

    def between(self, one: str, other: str) -> Proxy:
        return self.proxies[max(one, other), min(one, other)]

    def names_of(self, node: str) -> tuple[str, ...]:
        return tuple(proxy.name for pair, proxy in self.proxies.items() if node in pair)

    def stream(self, sender: str, receiver: str) -> str:
        return UP if sender > receiver else DOWN

    # --- faults -----------------------------------------------------------------------------------------------

    def cut(self, name: str, pairs: Iterable[tuple[str, str]]) -> Fault:
        """Nothing passes between these pairs, in either direction; the connections stand and are silent."""
        pairs = tuple(pairs)
        return self.one_way(name, [*pairs, *((there, here) for here, there in pairs)])

    def one_way(self, name: str, directions: Iterable[tuple[str, str]]) -> Fault:
        """What the first of each (sender, receiver) sends does not reach the second."""
        ways = tuple(directions)

        def strike() -> None:
            for sender, receiver in ways:
                stream = self.stream(sender, receiver)
                self.between(sender, receiver).add(f"cut-{stream}", "timeout", stream, {"timeout": 0})

        return self._fault(name, ways, strike)

    def slow(
        self, name: str, *, latency_ms: int, jitter_ms: int, kilobytes_per_s: int, slice_bytes: int
    ) -> Fault:
        """Every link, both ways."""

        def strike() -> None:
            for proxy in self.proxies.values():
                for stream in (UP, DOWN):
                    proxy.add(
                        f"latency-{stream}", "latency", stream, {"latency": latency_ms, "jitter": jitter_ms}
                    )
                    proxy.add(f"rate-{stream}", "bandwidth", stream, {"rate": kilobytes_per_s})
                    proxy.add(
                        f"slices-{stream}",
                        "slicer",
                        stream,
                        {"average_size": slice_bytes, "size_variation": slice_bytes // 2, "delay": 200},
                    )

        return self._fault(name, tuple(self.proxies), strike)

    def held(self, name: str, pairs: Iterable[tuple[str, str]], delay_ms: int) -> Fault:
        """What is sent arrives much later, after whoever sent it has dialled again."""
        ways = tuple(pairs)

        def strike() -> None:
            for one, other in ways:
                for stream in (UP, DOWN):
                    attributes = {"latency": delay_ms, "jitter": 0}
                    self.between(one, other).add(f"held-{stream}", "latency", stream, attributes)

        return self._fault(name, ways, strike)

    def reset(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Close the connections; they may be dialled again at once."""
        for one, other in pairs:
            proxy = self.between(one, other)
            proxy.enable(False)
            proxy.enable(True)

    def _fault(self, name: str, ways: tuple[tuple[str, str], ...], strike: Callable[[], None]) -> Fault:
        proxies = {self.between(*pair).name: self.between(*pair) for pair in ways}

        def heal() -> None:
            for proxy in proxies.values():
                proxy.heal()

        return Fault(name, tuple(proxies), strike, heal)
