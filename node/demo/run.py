"""Three nodes charge orders; the leader and three workers are killed meanwhile; then the money is counted.

The faults, each once:

- a worker is killed inside an effect, before the database's commit: the charge has not happened;
- a worker is killed after the commit, before it could say so: the charge has happened;
- a worker is killed after it wrote a receipt: it was sent;
- the leader is killed (SIGKILL, the whole node) when a third of the orders is charged.

Each leaves suspects, and the evidence that settled them is shown.

``failover_ms`` is the time from the leader's kill until a task was settled under the next leader: the two
nodes that are left are asked every few milliseconds; it counts once one of them knows a leader of a later
term and their count of settled tasks has grown since it did. Settling needs a majority's disks, so tasks
that were claimed before the kill and only finish after it do not shorten it.

On Kafka with a broker of the demo's own there is one more: when the leader's end is overcome the broker is killed,
too, and started again. A part of the orders is submitted only then, so that they go through the new broker.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dedup.ids import TaskId, id_text
from node.cli.connection import Api, connect_directory, quoted
from node.cli.output import CliError, console
from node.cli.starting import SupervisorLog, bring_down, prepare, wait_ready
from node.cluster import Cluster, signal_holder
from node.demo.account import Evidence, Outcome, charges_standing, count_money, count_receipts
from node.kafkaup.broker import Broker
from node.kafkaup.trial import EMBEDDED, KAFKA, Trial, trial_log
from node.records_file import HistoryFile
from node.records_model import EventKind
from node.supervisor import start_supervisor
from oncekeeper import Client
from oncekeeper.examples.orders import Order, read_orders, write_orders
from oncekeeper.examples.traps import caught, set_trap

APP = "oncekeeper.examples.shop:app"
NODES = 3
SUBMIT_TASKS = 2_000
RECEIPT_EACH = 100  # every so many orders
LOOK_S = 0.02
FAILOVER_LOOK_S = 0.005
FAILOVER_S_MAX = 30.0
# Without any progress for so long something is wrong; how long it takes at all depends on the machine.
STALL_S_MAX = 30.0
# A broker that was killed starts again, or has to find out that a node is gone (by Kafka's own settings in 45 s).
KAFKA_STALL_S_MAX = 90.0
READY_S_MAX = 60.0
SUSPECTS_SHOWN = 3
HISTORY_EVENTS_MAX = 100_000


def run_demo(count: int, directory: Path | None, quiet: bool, log: str = EMBEDDED) -> Outcome:
    home = (directory or Path(tempfile.mkdtemp(prefix="oncekeeper-demo-"))).absolute()
    home.mkdir(parents=True, exist_ok=True)
    outcome: Outcome | None = None
    try:
        with _signals_interrupt():
            outcome = _run(home, count, quiet, log)
        return outcome
    finally:
        if directory is None and outcome is not None and outcome.is_right:
            shutil.rmtree(home, ignore_errors=True)
        elif not quiet:
            print(f"everything that was written is in {home}", file=sys.stderr)


def _run(home: Path, count: int, quiet: bool, log: str) -> Outcome:
    if log == KAFKA and not quiet:
        print("starting a Kafka broker …", flush=True)
    with trial_log(log, home, "demo") as trial:
        return Demo(home, count, quiet, trial).run()


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP end the demo as Ctrl-C does, so that the nodes are stopped then too."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    former = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


class Demo:
    def __init__(self, home: Path, count: int, quiet: bool, trial: Trial) -> None:
        self._home = home
        self._trial = trial
        self._shop = home / "shop"
        self._count = count
        self._quiet = quiet
        self._outcome = Outcome(on_kafka=trial.is_kafka, restarts_wanted=int(trial.broker is not None))
        self._receipt_ids: dict[str, str] = {}
        self._console: Any = None if quiet else console()

    def run(self) -> Outcome:
        began = time.monotonic()
        orders = self._write_orders()
        os.environ["SHOP_DIR"] = str(self._shop)
        cluster = prepare(
            self._home / "cluster", nodes=NODES, app=APP, app_dir=self._home, log=self._trial.log_settings
        )
        self._say(f"starting {NODES} nodes …")
        watched = SupervisorLog(cluster)
        process = start_supervisor(cluster, restart=True, die_with_us=True)
        try:
            api = connect_directory(cluster.dir)
            wait_ready(api, READY_S_MAX, lambda: watched.refuse_failures(process))
            self._charge(cluster, api, orders)
            self._collect_evidence(cluster, api)
        finally:
            # Also on Ctrl-C: what was started here ends here.
            bring_down(cluster, timeout_s=15)
            process.wait()
        count_money(self._outcome, self._shop, orders)
        count_receipts(self._outcome, self._shop, orders[::RECEIPT_EACH])
        self._outcome.wall_s = time.monotonic() - began
        self._report()
        return self._outcome

    def _say(self, text: str) -> None:
        if self._console is not None:
            self._console.print(text, markup=False)

    def _write_orders(self) -> list[Order]:
        self._shop.mkdir()
        path = self._home / "orders.jsonl"
        write_orders(path, self._count)
        return read_orders(path)

    # --- the run --------------------------------------------------

    def _charge(self, cluster: Cluster, api: Api, orders: list[Order]) -> None:
        receipts = orders[::RECEIPT_EACH]
        # Spread over the run; the two charges well apart, so that each has a worker of its own to lose.
        for place, order in (
            ("before-commit", orders[len(orders) // 5]),
            ("after-commit", orders[len(orders) * 3 // 5]),
            ("after-receipt", receipts[len(receipts) // 2]),
        ):
            set_trap(self._shop, f"{place}-{order['order_id']}")
        broker = self._trial.broker
        later = len(orders) // 4 if broker is not None else 0
        at_once = orders[: len(orders) - later]
        with Client(cluster.dir) as client:
            began = time.monotonic()
            self._submit(client, "shop.charge", at_once, _charge_body)
            self._submit(client, "shop.send_receipt", receipts, _receipt_body)
            seconds = time.monotonic() - began
            self._say(f"submitted {len(at_once):,} orders and {len(receipts):,} receipts in {seconds:.1f} s")
            with self._progress(len(orders)) as show:
                self._until(api, lambda: charges_standing(self._shop) >= len(orders) // 3, show)
                self._kill_leader(cluster, api)
                if broker is not None:
                    self._restart_broker(broker, api, show)
                    self._submit(client, "shop.charge", orders[len(at_once) :], _charge_body)
                    self._say(f"submitted the other {later:,} orders")
                self._until(api, lambda: self._is_finished(api), show)

    def _restart_broker(self, broker: Broker, api: Api, show: Callable[[int], None]) -> None:
        """As a power switch; the nodes meanwhile run what they have at hand."""
        pid = broker.pid
        broker.kill()
        self._say(f"killed the Kafka broker, process {pid}, with SIGKILL")
        began = time.monotonic()
        broker.start(wait=False)
        self._until(api, lambda: broker.number in broker.alive(), show)
        broker.wait_ready({broker.number})
        self._outcome.broker_restarts += 1
        self._say(f"started it again; it answers after {time.monotonic() - began:.1f} s")

    def _submit(
        self, client: Client, handler: str, orders: list[Order], body: Callable[[Order], dict[str, object]]
    ) -> None:
        for at in range(0, len(orders), SUBMIT_TASKS):
            client.submit_many(handler, [body(order) for order in orders[at : at + SUBMIT_TASKS]])

    def _is_finished(self, api: Api) -> bool:
        try:
            answer = api.get("/v1/status")
        except CliError:
            return False  # between two leaders
        self._outcome.unresolved = answer["tasks"]["suspect"]
        # Suspects that wait for a human would wait for ever; the account will tell of them.
        return bool(answer["idle"]) and answer["tasks"]["suspect"] == answer["held"]

    def _until(self, api: Api, reached: Callable[[], bool], show: Callable[[int], None]) -> None:
        """Kill whoever waits for it, and show how far it is, until ``reached`` or nothing moves any more."""
        patience_s = KAFKA_STALL_S_MAX if self._trial.is_kafka else STALL_S_MAX
        moved, standing = time.monotonic(), -1
        while True:
            for place, pid in caught(self._shop).items():
                os.kill(pid, signal.SIGKILL)
                self._say(f"killed worker process {pid} {_where(place)}")
            now_standing = charges_standing(self._shop)
            if now_standing != standing:
                moved, standing = time.monotonic(), now_standing
                show(standing)
            if reached():
                return
            if time.monotonic() - moved > patience_s:
                raise CliError(f"nothing has moved for {patience_s:g} s; {standing} orders are charged")
            time.sleep(LOOK_S)

    def _kill_leader(self, cluster: Cluster, api: Api) -> None:
        rows = {row["node"]: row for row in api.get("/v1/nodes")["nodes"] if row.get("up")}
        leader = next((name for name, row in rows.items() if row["role"] == "leader"), None)
        if leader is None:
            raise CliError("there is no leader to be killed")
        survivors = [peer.http for name, peer in cluster.peers.items() if name != leader]
        term = rows[leader]["term"]
        # Connections are open before the kill, so that opening them does not count.
        watch = connect_directory(cluster.dir)
        watch.keep_only(survivors)
        list(watch.ask_each("/v1/status?local=1"))
        if not signal_holder(cluster.node_lock(leader), signal.SIGKILL):
            raise CliError(f"{leader} was gone before it could be killed")
        killed = time.monotonic()
        self._say(f"killed the leader, {leader}, with SIGKILL (it is started again at once)")
        self._outcome.failover_ms = self._watch_failover(watch, term, killed)
        self._say(f"{self._outcome.failover_ms} ms later a task was settled under the next leader")

    def _watch_failover(self, watch: Api, old_term: int, killed: float) -> int:
        settled_before = -1
        while time.monotonic() - killed < FAILOVER_S_MAX:
            rows = [row for _, row in watch.ask_each("/v1/status?local=1") if row is not None]
            settled = sum(row["tasks_settled"] for row in rows)
            if settled_before >= 0 and settled > settled_before:
                return round((time.monotonic() - killed) * 1000)
            if settled_before < 0 and any(row["term"] > old_term and row["leader"] for row in rows):
                settled_before = settled
            for pid in caught(self._shop).values():
                os.kill(pid, signal.SIGKILL)
            time.sleep(FAILOVER_LOOK_S)
        raise CliError(f"no task was settled within {FAILOVER_S_MAX:g} s of the leader's end")

    # --- the evidence --------------------------------------------------

    def _collect_evidence(self, cluster: Cluster, api: Api) -> None:
        """Every task that any node's history knows as a suspect, and the stories of some."""
        suspects = _suspects_of(cluster)
        self._outcome.suspects = len(suspects)
        told: dict[tuple[str, ...], int] = {}
        for text in suspects:
            answer = api.get(f"/v1/tasks/{quoted(text)}/why")
            # One of a kind is enough: how it was lost, who testified, what settled it.
            kind = tuple(f"{each['kind']}{each['what']}{each['by']}" for each in answer["events"])
            told[kind] = told.get(kind, 0) + 1
            if told[kind] == 1:
                what = f"{answer['handler']} {answer['body']}" if answer["handler"] else ""
                self._outcome.evidence.append(Evidence(text, what, answer["story"]))

    # --- the report --------------------------------------------------

    def _report(self) -> None:
        if self._console is None:
            return
        from rich.table import Table

        done = self._outcome
        self._say(f"\n{done.suspects:,} tasks were in doubt. One of each kind, and the evidence:")
        for evidence in done.evidence:
            self._say(f"\n  {evidence.id}  {evidence.what}")
            for sentence in evidence.story:
                self._say(f"    {sentence}")
        table = Table(box=None, pad_edge=False, show_header=False)
        for name, value in (
            ("orders submitted", f"{done.submitted:,}"),
            ("charged", f"{done.effects:,}"),
            ("lost", f"{done.lost:,}"),
            ("twice", f"{done.twice:,}"),
            ("money due", _euros(done.cents_due)),
            ("money charged", _euros(done.cents_charged)),
            ("suspects", f"{done.suspects:,}, of them unresolved {done.unresolved:,}"),
            ("leader's kill to the next settled task", f"{done.failover_ms:,} ms"),
            ("all in all", f"{done.wall_s:.1f} s"),
        ):
            table.add_row(name, value)
        self._say("")
        self._console.print(table)
        self._say("\nevery order took effect exactly once" if done.is_right else "\nTHIS IS WRONG")

    @contextmanager
    def _progress(self, total: int) -> Iterator[Callable[[int], None]]:
        if self._console is None or not self._console.is_terminal:
            yield lambda standing: None
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

        with Progress(
            "charging", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=self._console
        ) as progress:
            meter = progress.add_task("charging", total=total)
            yield lambda standing: progress.update(meter, completed=standing)


def _charge_body(order: Order) -> dict[str, object]:
    return {"order_id": order["order_id"], "amount_cents": order["amount_cents"]}


def _receipt_body(order: Order) -> dict[str, object]:
    return {"order_id": order["order_id"], "to": order["customer"]}


def _where(place: str) -> str:
    stage, _, order = place.rpartition("-")
    said = {
        "before-commit": "inside the charge of order {}, before the database's commit",
        "after-commit": "after it had charged order {}, before it could say so",
        "after-receipt": "after it had sent the receipt of order {}, before it could say so",
    }[stage]
    return said.format(order)


def _suspects_of(cluster: Cluster) -> list[str]:
    found: set[TaskId] = set()
    for node in cluster.peers:
        history = HistoryFile(cluster.node_dir(node) / "history.db")
        try:
            for event in history.events_of(EventKind.SUSPECTED, None, HISTORY_EVENTS_MAX).values():
                found.update(event.ids)
        finally:
            history.close()
    return sorted(id_text(each) for each in found)


def _euros(cents: int) -> str:
    return f"€ {cents // 100:,}.{cents % 100:02d}"
