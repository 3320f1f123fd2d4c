"""A node's own view of its session: until when may it work?

The ledger lapses a session ``timeout_ms`` of ledger time after it applied the last heartbeat, and ledger time
never runs faster than a leader's monotonic clock. A node cannot see when its heartbeat was applied, but it knows
when it *sent* it, which was earlier. So work that stops ``margin_ms`` before sending time + timeout stops before
the session can lapse anywhere (Gray and Cheriton, "Leases", 1989). The margin covers what clocks drift and how
long a kill takes. Times are milliseconds of one monotonic clock of the machine.
"""

from __future__ import annotations


class Lease:
    """Lost until the first heartbeat is confirmed, and again when it runs out."""

    def __init__(self, timeout_ms: int, margin_ms: int) -> None:
        if not 0 < margin_ms < timeout_ms:
            raise ValueError(
                f"fence_margin_ms={margin_ms} must be below session_timeout_ms={timeout_ms}: "
                "work must stop before its session can lapse"
            )
        self._span_ms = timeout_ms - margin_ms
        self.deadline_ms = 0
        """Work must have stopped by then."""

    def confirmed(self, sent_ms: int) -> None:
        """A heartbeat (or join) that was sent at ``sent_ms`` was applied. Late confirmations change nothing."""
        self.deadline_ms = max(self.deadline_ms, sent_ms + self._span_ms)

    def lost(self) -> None:
        """The ledger says that the session is gone."""
        self.deadline_ms = 0

    def left_ms(self, now_ms: int) -> int:
        """How long work may go on; 0 when it must not."""
        return max(0, self.deadline_ms - now_ms)
