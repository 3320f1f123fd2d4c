"""Orders for the example shop, as a JSON Lines file: the same count and seed give the same file."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

SEED = 2026
FIRST_NAMES = ("ada", "alan", "barbara", "edsger", "grace", "leslie", "nancy", "tony")


class Order(TypedDict):
    order_id: int
    customer: str
    amount_cents: int


def orders(count: int, seed: int = SEED) -> Iterator[Order]:
    draw = random.Random(seed)
    for number in range(1, count + 1):
        customer = f"{draw.choice(FIRST_NAMES)}{draw.randrange(1000)}@example.org"
        yield Order(order_id=number, customer=customer, amount_cents=draw.randrange(100, 100_000))


def write_orders(path: Path, count: int, seed: int = SEED) -> None:
    with path.open("w") as file:
        for order in orders(count, seed):
            file.write(json.dumps(order) + "\n")


def read_orders(path: Path) -> list[Order]:
    with path.open() as file:
        return [json.loads(line) for line in file]
