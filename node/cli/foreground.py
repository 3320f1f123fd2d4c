"""`cluster up` without --detach: the supervisor runs here, and what it does is shown as it happens."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from typing import Any

from node.cli.connection import Api, connect_directory
from node.cli.output import DONE, FAILED, CliError, console, note, print_json
from node.cli.starting import is_ready, node_rows, output_tail
from node.cli.watching import STATES
from node.cluster import Cluster
from node.supervisor import EXIT_BAD_CONFIG, Event, Supervisor

LOOK_S = 0.5


class Foreground:
    def __init__(self, cluster: Cluster, restart: bool, as_json: bool) -> None:
        self._cluster = cluster
        self._as_json = as_json
        self._api: Api = connect_directory(cluster.dir)
        self._supervisor = Supervisor(cluster, restart=restart, on_event=self._on_event)
        self._console: Any = None if as_json else console(for_errors=True)
        self._live: Any = None
        self._failure = ""
        self._ready = False
        self._stops = 0

    async def run(self, timeout_s: float) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal)
        with self._display():
            watching = asyncio.create_task(self._watch(timeout_s))
            try:
                await self._supervisor.run()
            finally:
                watching.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watching
        if self._failure:
            raise CliError(self._failure)
        return DONE if self._ready else FAILED

    def _on_signal(self) -> None:
        self._stops += 1
        self._supervisor.stop()
        self._say(
            "stopping: the nodes drain; once more kills them" if self._stops == 1 else "killing the nodes"
        )

    def _on_event(self, event: Event) -> None:
        code = "" if event.exit_code is None else f" with {event.exit_code}"
        self._say(
            f"{event.node} {event.what}{code}" + (f": {event.detail}" if event.detail else f" ({event.pid})")
        )
        if event.what == "exited" and event.exit_code == EXIT_BAD_CONFIG:
            self._fail(f"{event.node} cannot be started. It said:\n{output_tail(self._cluster, event.node)}")

    def _fail(self, why: str) -> None:
        self._failure = self._failure or why
        self._supervisor.stop()

    async def _watch(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            # In a thread: it blocks, and the supervisor must go on.
            rows, counts = await asyncio.to_thread(self._look)
            if not self._ready and is_ready(rows):
                self._ready = True
                self._announce(rows)
            elif not self._ready and time.monotonic() > deadline:
                self._fail(
                    f"the cluster does not take work after {timeout_s:g} s; see {self._cluster.dir}/nodes"
                )
            if self._live is not None:
                self._live.update(_picture(rows, counts))
            await asyncio.sleep(LOOK_S)

    def _look(self) -> tuple[list[dict[str, Any]], dict[str, int]]:
        try:
            return node_rows(self._api), self._api.get("/v1/status")["tasks"]
        except CliError:
            return [], {}  # nobody answers yet, or any more: the next look may find somebody

    def _announce(self, rows: list[dict[str, Any]]) -> None:
        if self._as_json:
            print_json({"dir": str(self._cluster.dir), "app": self._cluster.app, "nodes": rows})
        self._say(
            f"{len(rows)} nodes run {self._cluster.app}; data in {self._cluster.dir}; Ctrl-C stops them"
        )

    def _say(self, text: str) -> None:
        if self._as_json:
            return
        if self._live is not None:
            self._live.console.print(text, markup=False)
        else:
            note(text)

    @contextlib.contextmanager
    def _display(self) -> Any:
        if self._as_json or not sys.stderr.isatty():
            yield
            return
        from rich.live import Live

        with Live(console=self._console, transient=True, refresh_per_second=4) as self._live:
            yield
        self._live = None


def _picture(rows: list[dict[str, Any]], counts: dict[str, int]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("node", "pid", "role", "takes work", "running", "settled"):
        table.add_column(name)
    for row in rows:
        if row.get("up"):
            told = (
                row["pid"],
                row["role"],
                "yes" if row["takes_work"] else "no",
                row["running"],
                row["tasks_settled"],
            )
            table.add_row(row["node"], *(str(each) for each in told))
        else:
            table.add_row(row["node"], "-", "down", "-", "-", "-")
    table.caption = "  ".join(f"{state} {counts[state]:,}" for state in STATES if counts.get(state))
    return table


def run_foreground(cluster: Cluster, *, restart: bool, timeout_s: float, as_json: bool) -> int:
    return asyncio.run(Foreground(cluster, restart, as_json).run(timeout_s))
