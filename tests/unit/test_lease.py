"""A node's own view of its session."""

from __future__ import annotations

import pytest

from node.lease import Lease


def test_a_lease_counts_from_the_sending_and_stops_a_margin_early() -> None:
    lease = Lease(timeout_ms=4000, margin_ms=1000)
    assert lease.left_ms(0) == 0, "lost until the first confirmation"
    lease.confirmed(sent_ms=10_000)
    assert lease.deadline_ms == 13_000
    assert lease.left_ms(12_999) == 1
    assert lease.left_ms(13_000) == 0


def test_a_late_confirmation_of_an_earlier_heartbeat_does_not_shorten_the_lease() -> None:
    lease = Lease(4000, 1000)
    lease.confirmed(20_000)
    lease.confirmed(10_000)
    assert lease.deadline_ms == 23_000


def test_a_margin_that_is_not_below_the_timeout_is_refused_with_the_rule() -> None:
    with pytest.raises(ValueError, match="fence_margin_ms=4000 must be below session_timeout_ms=4000"):
        Lease(4000, 4000)
