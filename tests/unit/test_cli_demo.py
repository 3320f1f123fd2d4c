"""The demo's account must be able to say that something is wrong; else it proves nothing."""

import os
import sqlite3

import pytest

from node.demo.account import Outcome, charges_standing, count_money, count_receipts
from oncekeeper.examples import traps
from oncekeeper.examples.orders import orders, read_orders, write_orders

ORDERS = list(orders(5))
RECEIPTS = [f"{order['order_id']} {order['customer']}" for order in ORDERS]


def outcome_of(shop, charges, receipts=RECEIPTS):
    with sqlite3.connect(shop / "money.db") as db:
        db.execute(
            "CREATE TABLE effects (row INTEGER PRIMARY KEY, order_id INT, amount_cents INT, at_ms INT)"
        )
        db.executemany("INSERT INTO effects (order_id, amount_cents, at_ms) VALUES (?, ?, 0)", charges)
    db.close()
    (shop / "receipts.txt").write_text("".join(line + "\n" for line in receipts))
    outcome = Outcome(failover_ms=1)
    count_money(outcome, shop, ORDERS)
    count_receipts(outcome, shop, ORDERS)
    return outcome


def right_charges():
    return [(order["order_id"], order["amount_cents"]) for order in ORDERS]


def test_each_order_charged_once_is_right(tmp_path):
    outcome = outcome_of(tmp_path, right_charges())
    assert (outcome.submitted, outcome.effects, outcome.lost, outcome.twice) == (5, 5, 0, 0)
    assert outcome.cents_due == outcome.cents_charged == sum(cents for _, cents in right_charges())
    assert outcome.is_right


def test_a_charge_that_is_missing_is_lost(tmp_path):
    outcome = outcome_of(tmp_path, right_charges()[1:])
    assert (outcome.effects, outcome.lost, outcome.twice, outcome.is_right) == (4, 1, 0, False)


def test_a_charge_that_stands_twice_is_seen(tmp_path):
    outcome = outcome_of(tmp_path, [*right_charges(), right_charges()[0]])
    assert (outcome.effects, outcome.lost, outcome.twice, outcome.is_right) == (6, 0, 1, False)


def test_one_lost_and_one_twice_do_not_make_up_for_each_other(tmp_path):
    outcome = outcome_of(tmp_path, [*right_charges()[1:], right_charges()[1]])
    assert (outcome.effects, outcome.lost, outcome.twice, outcome.is_right) == (5, 1, 1, False)


def test_a_cent_too_much_is_wrong(tmp_path):
    charges = right_charges()
    charges[0] = (charges[0][0], charges[0][1] + 1)
    outcome = outcome_of(tmp_path, charges)
    assert (outcome.lost, outcome.twice, outcome.is_right) == (0, 0, False)


@pytest.mark.parametrize(
    ("receipts", "lost", "twice"),
    [(RECEIPTS[1:], 1, 0), ([*RECEIPTS, RECEIPTS[0]], 0, 1), ([*RECEIPTS, "99 nobody@example.org"], 0, 1)],
)
def test_receipts_are_counted_too(tmp_path, receipts, lost, twice):
    outcome = outcome_of(tmp_path, right_charges(), receipts)
    assert (outcome.lost, outcome.twice) == (lost, twice)
    assert outcome.is_right is not bool(lost or twice)


def test_a_suspect_that_nobody_could_settle_is_wrong(tmp_path):
    outcome = outcome_of(tmp_path, right_charges())
    outcome.unresolved = 1
    assert not outcome.is_right


def test_programs_get_these_numbers_and_no_others():
    names = ["submitted", "effects", "lost", "twice", "suspects", "failover_ms", "wall_s"]
    assert list(Outcome().document()) == names


def test_what_stands_is_counted_before_there_is_a_database(tmp_path):
    assert charges_standing(tmp_path) == 0


def test_the_same_count_gives_the_same_orders(tmp_path):
    write_orders(tmp_path / "a", 100)
    write_orders(tmp_path / "b", 100)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert read_orders(tmp_path / "a") == list(orders(100))


def test_a_trap_catches_the_first_attempt_and_lets_the_second_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(traps, "WAIT_S_MAX", 0)
    traps.pause_if_told(tmp_path, "after-commit-7")  # no trap: it passes
    traps.set_trap(tmp_path, "after-commit-7")
    traps.pause_if_told(tmp_path, "after-commit-7")
    assert traps.caught(tmp_path) == {"after-commit-7": os.getpid()}
    traps.pause_if_told(tmp_path, "after-commit-7")
    assert traps.caught(tmp_path) == {}
