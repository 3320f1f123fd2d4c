"""The account of a demonstration, from the shop's own files: nothing here asks the cluster."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from oncekeeper.examples.orders import Order


@dataclass(frozen=True, slots=True)
class Evidence:
    """A task that was in doubt, and the sentences that tell how the doubt was settled."""

    id: str
    what: str
    story: Sequence[str]


@dataclass(slots=True)
class Outcome:
    submitted: int = 0  # orders
    effects: int = 0  # charges that stand in the shop's database
    lost: int = 0  # orders without a charge, and receipts that were never sent
    twice: int = 0  # charges and receipts beyond the first
    cents_due: int = 0
    cents_charged: int = 0
    suspects: int = 0
    unresolved: int = 0
    failover_ms: int = 0
    on_kafka: bool = False
    broker_restarts: int = 0
    restarts_wanted: int = 0
    wall_s: float = 0.0
    evidence: list[Evidence] = field(default_factory=list)

    @property
    def is_right(self) -> bool:
        return (
            self.submitted == self.effects
            and not self.lost
            and not self.twice
            and self.cents_due == self.cents_charged
            and not self.unresolved
            and self.failover_ms > 0
            and self.broker_restarts == self.restarts_wanted
        )

    def document(self) -> dict[str, object]:
        names = ("submitted", "effects", "lost", "twice", "suspects", "failover_ms")
        found = {name: getattr(self, name) for name in names}
        if self.on_kafka:
            found["broker_restarts"] = self.broker_restarts
        return found | {"wall_s": round(self.wall_s, 1)}


def charges_standing(shop: Path) -> int:
    """How many charges are committed now; for the progress bar, while others write."""
    path = shop / "money.db"
    if not path.exists():
        return 0
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)) as db:
            return int(db.execute("SELECT coalesce(max(row), 0) FROM effects").fetchone()[0])
    except sqlite3.OperationalError:
        return 0  # the table is being made at this very moment


def count_money(outcome: Outcome, shop: Path, orders: Sequence[Order]) -> None:
    """Compare each order with what was charged for it."""
    with closing(sqlite3.connect(f"file:{shop / 'money.db'}?mode=ro", uri=True, timeout=30)) as db:
        rows = db.execute("SELECT order_id, amount_cents FROM effects").fetchall()
    charged = Counter(order for order, _ in rows)
    outcome.submitted = len(orders)
    outcome.effects = len(rows)
    outcome.lost += sum(charged[order["order_id"]] == 0 for order in orders)
    due = {order["order_id"] for order in orders}
    # A charge that nobody asked for is an effect too many.
    outcome.twice += sum(count - (order in due) for order, count in charged.items())
    outcome.cents_due = sum(order["amount_cents"] for order in orders)
    outcome.cents_charged = sum(cents for _, cents in rows)


def count_receipts(outcome: Outcome, shop: Path, wanted: Sequence[Order]) -> None:
    path = shop / "receipts.txt"
    sent = Counter(path.read_text().splitlines() if path.exists() else ())
    due = {f"{order['order_id']} {order['customer']}" for order in wanted}
    outcome.lost += sum(sent[line] == 0 for line in due)
    # A receipt that nobody asked for is an effect too many.
    outcome.twice += sum(count - (line in due) for line, count in sent.items())
