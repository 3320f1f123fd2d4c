from __future__ import annotations

import msgspec
import pytest

from dedup.ids import Ids
from raft.codec import CodecError, open_snapshot, seal_snapshot
from raft.commands import (
    Cancel,
    Fire,
    Launched,
    Leave,
    PauseSchedule,
    PutClass,
    PutQueue,
    PutSchedule,
    Result,
    Timetable,
)
from raft.ledger import Ledger, LedgerSettings
from tests.support.ledger_driver import KEY, Driver, run_of


def full() -> Driver:
    """A ledger with something in every table."""
    driver = Driver()
    driver.allocate()
    n1, n2 = driver.join("n1"), driver.join("n2")
    fence = driver.claim(n1, Ids(((1, 100), (200, 5)), (KEY,)))
    driver.settle(n1, fence, run_of(1, 50), Result.DONE)
    driver.settle(n1, fence, run_of(60, 2), Result.DEAD)
    driver.settle(n1, fence, run_of(70, 2), Result.RETRY, 500)
    driver.claim(n2, run_of(300, 10))
    driver.do(Leave(n2))
    driver.do(Cancel(run_of(400), "ann"))
    driver.do(PutQueue("mail", True))
    driver.do(PutClass("h", "cpu", "long"))
    driver.do(PutSchedule("s", Timetable("* * * * *", "UTC", "h", "default", b"{}"), "hand", "ann", 1))
    driver.do(Fire("s", driver.index, 60_000, True, 3))
    driver.pass_ms(700)
    return driver


def test_a_restored_ledger_is_equal_in_bytes_and_in_what_it_says() -> None:
    driver = full()
    restored = Ledger(3)
    restored.restore(driver.ledger.snapshot())
    restored.check_invariants()
    assert restored.snapshot() == driver.ledger.snapshot()
    assert restored.digest() == driver.ledger.digest()
    assert restored.counts() == driver.ledger.counts()
    assert restored.sessions == driver.ledger.sessions
    assert restored.suspects(None, 100) == driver.ledger.suspects(None, 100)
    assert list(restored.open_claims(2)) == list(driver.ledger.open_claims(2))


def test_ledgers_that_differ_in_anything_differ_in_their_digest() -> None:
    base = full().ledger.digest()
    assert full().ledger.digest() == base
    for change in (
        PutQueue("mail", False),
        PutClass("h", "io", "long"),
        Cancel(run_of(999)),
        Leave(2),
        PauseSchedule("s", True, "ann", 2),
        Launched("s", 60_000),
    ):
        driver = full()
        driver.do(change)
        assert driver.ledger.digest() != base


def test_a_snapshot_of_before_there_were_firings_still_reads() -> None:
    driver = full()
    driver.do(Launched("s", 60_000))
    body = msgspec.msgpack.decode(open_snapshot(driver.ledger.snapshot()))
    assert body.pop() == []
    assert body[1].pop() == LedgerSettings().firings_max
    restored = Ledger(3)
    restored.restore(seal_snapshot(msgspec.msgpack.encode(body)))
    assert restored.digest() == driver.ledger.digest()


@pytest.mark.parametrize(
    ("ledger", "reason"),
    [
        (Ledger(4), "bloom_seed=3 of the snapshot must be 4"),
        (Ledger(3, LedgerSettings(entries_max=5)), "entries_max=5 must be 8388608"),
    ],
)
def test_a_snapshot_of_another_cluster_or_other_settings_is_refused(ledger: Ledger, reason: str) -> None:
    with pytest.raises(CodecError, match=reason):
        ledger.restore(full().ledger.snapshot())


def test_bytes_that_hold_no_ledger_are_refused_and_change_nothing() -> None:
    driver = full()
    before = driver.ledger.digest()
    sound = driver.ledger.snapshot()
    for bad in (
        b"",
        sound[:-1],
        sound[:100] + b"\x00" + sound[101:],
        seal_snapshot(b"\x90"),
        seal_snapshot(b""),
    ):
        with pytest.raises(CodecError):
            driver.ledger.restore(bad)
    assert driver.ledger.digest() == before
