"""A TCP proxy on every link of a cluster, in a thread: pass, cut (close and refuse) or swallow (a black hole)."""

from __future__ import annotations

import asyncio
import threading
from enum import Enum

from tests.support.raft_cluster import Cluster, free_ports


class Mode(Enum):
    PASS = "pass"
    CUT = "cut"
    HOLE = "hole"


class Proxies:
    """Stands on every link of a cluster that was not started yet: its peers are dialled here."""

    def __init__(self, cluster: Cluster) -> None:
        self.names = list(cluster.settings)
        self._mode: dict[frozenset[str], Mode] = {}
        self._open: dict[frozenset[str], set[asyncio.StreamWriter]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        for name, settings in cluster.settings.items():
            peers = dict(settings["peers"])
            for other, port in peers.items():
                if name < other:
                    continue  # the greater id dials
                (listen,) = free_ports(1)
                pair = frozenset((name, other))
                asyncio.run_coroutine_threadsafe(self._serve(pair, listen, port), self._loop).result(5)
                peers[other] = listen
            settings["peers"] = peers

    async def _serve(self, pair: frozenset[str], listen: int, port: int) -> None:
        self._mode[pair] = Mode.PASS
        self._open[pair] = set()

        async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while data := await reader.read(65536):
                    if self._mode[pair] is not Mode.HOLE:
                        writer.write(data)
                        await writer.drain()
            except OSError:
                pass  # either end closed: close the other
            finally:
                writer.close()

        async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if self._mode[pair] is Mode.CUT:
                writer.close()
                return
            try:
                far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                writer.transport.abort()
                return
            both = {writer, far_writer}
            self._open[pair] |= both
            await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))
            self._open[pair] -= both

        await asyncio.start_server(accepted, "127.0.0.1", listen)

    def set(self, one: str, other: str, mode: Mode) -> None:
        pair = frozenset((one, other))

        def change() -> None:
            self._mode[pair] = mode
            if mode is Mode.CUT:
                for writer in self._open[pair]:
                    writer.transport.abort()

        self._loop.call_soon_threadsafe(change)

    def isolate(self, name: str, mode: Mode) -> None:
        for other in self.names:
            if other != name:
                self.set(name, other, mode)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
