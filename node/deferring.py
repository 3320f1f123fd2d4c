"""A coordinator's delayed tasks: handed on to the store as they are read, and taken from it when due (pure).

    read, not due --Defer--> store --dues.py--> a piece with a row --claimed, run, settled--> dropped
                                                  |  retry: MoveDelayed, back to the store

What a former owner may have handed on already is always handed on again before anything else is done with it,
however soon it is due: what stands in the store stays as it is, so it alone says when the task is due, and a task
that was rescheduled does not run by the time in its message. Whether that may be so is seen from the message
alone (``is_kept``).

What is due sooner than that waits in memory, and is looked up in the store when its time has come (``look_up``): it
stands there only if somebody rescheduled it, and then goes by its row. A piece that could not run yet is looked up
again before it may, and a piece with a row is fetched again (``again``), for the same reason.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from node import messages as m
from node.dues import Dues, DueSettings, FetchDue
from node.partitions import Partitions
from node.pieces import Piece, is_delayed
from oncekeeper.envelope import TaskBatch
from oncekeeper.log.delayed import ENQUEUE, RUN, Deferral, Delayed, DelayStore, Place
from oncekeeper.log.port import Fetched, Undecodable

HAND_ON_MS = 2_000
"""What is due within this time of being submitted waits in memory: the store would cost two writes."""
RETRY_HAND_ON_MS = 60_000
"""Which retries go to the store: those whose delay is longer than this.

Whether a retry may run yet is the ledger's to say, by the ledger's time. The store knows wall time only, so a clock
that was an hour fast when the retry was written makes it an hour late. A shorter one waits in its owner's memory,
by the machine's monotonic clock, and holds its position meanwhile.
"""
DEFERRING_MAX = 32_768
"""Tasks on their way to the store; beyond, reading pauses."""
DEFER_ROWS_MAX = 2_048
"""Of one write to the store: its rows are made and answered for on the loop, between whose turns Raft is served."""
RELOAD_MS = 15_000
"""How often the next page is loaded anew, should nobody have told us of a change."""
LOOK_UP_MAX = 256  # pieces of one LookUp: a few milliseconds of the loop
_MOVE_STEP_MS = 100  # retries with delays of their own share their writes
_Kept = tuple[Piece, int]


def is_kept(batch: TaskBatch) -> bool:
    """Whether tasks of this message are handed on to the store, by whoever reads them, and whenever."""
    return is_delayed(batch) and is_far(batch.due_ms - batch.submitted_ms)


def due_by_message(piece: Piece) -> int:
    """Until when it waits because its message says so; 0: it does not.

    What came from the store waits by the store alone, and what is enqueued has waited: its message may name a time
    that is long past by a reschedule, or far ahead.
    """
    return piece.batch.due_ms if piece.row is None and is_delayed(piece.batch) else 0


def is_far(delay_ms: int) -> bool:
    """Whether the store is worth it."""
    return delay_ms > HAND_ON_MS


def is_far_retry(delay_ms: int) -> bool:
    return delay_ms > RETRY_HAND_ON_MS


@dataclass(frozen=True, slots=True)
class Found:
    """What is due: a piece to sort, unless its item cannot be decoded."""

    row: Delayed
    epoch: int
    item: Fetched | Undecodable


class Deferring:
    def __init__(self, partitions: Partitions, numbers: Iterator[int], wall_ms: int) -> None:
        self._partitions = partitions
        self._numbers = numbers
        self._dues = Dues(DueSettings(), wall_ms)
        self._to_defer: list[_Kept] = []
        self._to_move: list[_Kept] = []
        self._deferring: dict[int, list[_Kept]] = {}
        self._moving: dict[int, list[_Kept]] = {}
        self._to_look: deque[Piece] = deque()
        self._looking: dict[int, list[Piece]] = {}
        self.tasks = 0
        """On their way to the store, or being looked up there."""
        self._fetching = 0
        self._reload_ms = 0
        self._is_open = False

    # --- partitions -------------------------------------------------------------------------------------------

    def assign(self) -> None:
        """The partitions are others now; the next owner reads what was not handed on, and loads what was."""
        self._dues.assign(self._partitions.epochs())
        kept = [kept for kept in self._to_defer if self._partitions.is_ours(kept[0])]
        self.tasks -= sum(piece.count for piece, _ in self._to_defer) - sum(piece.count for piece, _ in kept)
        self._to_defer = kept
        self._to_move = [kept for kept in self._to_move if self._partitions.is_ours(kept[0])]
        looked = deque(piece for piece in self._to_look if self._partitions.is_ours(piece))
        self.tasks -= sum(piece.count for piece in self._to_look) - sum(piece.count for piece in looked)
        self._to_look = looked

    def changed(self, partitions: Iterable[int]) -> None:
        for number in partitions:
            self._dues.reload(number)

    # --- to the store -----------------------------------------------------------------------------------------

    def hand_on(self, piece: Piece, due_ms: int) -> None:
        """Let it wait until then. An epoch that is over leaves it to the next owner."""
        if not self._partitions.is_ours(piece):
            return
        if piece.row is None:
            self._to_defer.append((piece, due_ms))
            self.tasks += piece.count
        else:
            self._to_move.append((piece, -(-due_ms // _MOVE_STEP_MS) * _MOVE_STEP_MS))

    def deferred(self, ticket: int) -> list[Piece]:
        """They stand in the store now; those that are ours."""
        stored: list[Piece] = []
        for piece, due_ms in self._deferring.pop(ticket):
            self.tasks -= piece.count
            if self._partitions.is_ours(piece):
                self._partitions.settled(piece)
                row = Delayed(due_ms, piece.partition, piece.offset, piece.count, _way(piece.batch))
                self._dues.stored((row,))
                stored.append(piece)
        return stored

    def cancelled(self, piece: Piece) -> None:
        """It was while it was on its way to the store: whoever cancelled it did not find it there."""
        self._dues.forget(Place(piece.partition, piece.offset, piece.count))

    def moved(self, ticket: int) -> None:
        for piece, due_ms in self._moving.pop(ticket):
            if piece.row is not None and self._partitions.is_ours(piece):
                self._dues.moved(piece.row, piece.offset, piece.count, due_ms)

    def _writes(self) -> Iterator[m.Effect]:
        """One of a kind at a time, with what has gathered: large ones are what makes it fast."""
        if self._to_defer and not self._deferring:
            ticket = next(self._numbers)
            self._deferring[ticket] = self._to_defer[:DEFER_ROWS_MAX]
            self._to_defer = self._to_defer[DEFER_ROWS_MAX:]
            yield m.Defer(ticket, tuple(_deferral(*kept) for kept in self._deferring[ticket]))
        if self._to_move and not self._moving:
            ticket = next(self._numbers)
            self._moving[ticket], self._to_move = self._to_move, []
            groups: dict[tuple[int, int], list[Place]] = {}
            for piece, due_ms in self._moving[ticket]:
                assert piece.row is not None
                place = Place(piece.partition, piece.offset, piece.count)
                groups.setdefault((due_ms, piece.row.due_ms), []).append(place)
            moves = tuple((tuple(places), due_ms, was_ms) for (due_ms, was_ms), places in groups.items())
            yield m.MoveDelayed(ticket, moves)

    # --- from the store ---------------------------------------------------------------------------------------

    def look(self, now_ms: int, wall_ms: int, is_open: bool, room: int) -> Iterator[m.Effect]:
        """What is to be written, and if ``is_open`` what is due, for at most about ``room`` tasks."""
        yield from self._writes()
        self._is_open = is_open
        if not is_open:
            return
        if now_ms - self._reload_ms > RELOAD_MS:
            self._reload_ms = now_ms
            self.changed(self._partitions.epochs())
        if self._to_look and not self._looking:
            yield self._look_up()
        # One fetch at a time: between two of them the loop serves what else there is.
        for effect in self._dues.look(wall_ms, 0 if self._fetching else room):
            if isinstance(effect, FetchDue):
                self._fetching += sum(row.count for row in effect.rows)
            yield effect

    def loaded(self, event: m.DueLoaded) -> None:
        self._dues.loaded(event.load, event.rows)

    def fetched(self, event: m.DueFetched) -> list[Found]:
        self._fetching -= sum(row.count for row in event.fetch.rows)
        return [Found(*each) for each in self._dues.fetched(event.fetch, event.found)]

    def enqueued(self, event: m.DueEnqueued) -> list[Found]:
        """What is left is for dead letters."""
        self._partitions.more(event.partitions)
        return [Found(*each) for each in self._dues.fetched(FetchDue(event.enqueue.rows), event.left)]

    def again(self, piece: Piece) -> None:
        """It may run now, if it still waits for the time that it was fetched for."""
        if piece.row is None:
            self.look_up(piece)
        elif self._partitions.is_ours(piece):
            self._dues.again(piece.row, piece.offset, piece.count)

    # --- what waited in memory ----------------------------------------------------------------------------------

    def look_up(self, piece: Piece) -> None:
        """It is due by its message: by the store too?"""
        if self._partitions.is_ours(piece):
            self._to_look.append(piece)
            self.tasks += piece.count

    def _look_up(self) -> m.LookUp:
        ticket = next(self._numbers)
        pieces = [self._to_look.popleft() for _ in range(min(LOOK_UP_MAX, len(self._to_look)))]
        self._looking[ticket] = pieces
        return m.LookUp(ticket, tuple(Place(each.partition, each.offset, each.count) for each in pieces))

    def looked_up(self, event: m.LookedUp) -> list[Piece]:
        """Those that do not stand in the store. The others' rows are durable: their position may pass them."""
        rows: dict[int, list[Delayed]] = {}
        for row in event.rows:
            rows.setdefault(row.partition, []).append(row)
        runs: list[Piece] = []
        for piece in self._looking.pop(event.ticket):
            self.tasks -= piece.count
            if not self._partitions.is_ours(piece):
                continue
            at = 0
            for row in rows.get(piece.partition, ()):
                low, high = max(row.offset - piece.offset, at), min(row.end - piece.offset, piece.count)
                if low >= high:
                    continue
                if low > at:
                    runs.append(piece.part(at, low - at))
                self._partitions.settled(piece.part(low, high - low))
                at = high
            if at < piece.count:
                runs.append(piece.part(at, piece.count - at))
        return runs

    def settled(self, piece: Piece) -> None:
        if piece.row is not None and self._partitions.is_ours(piece):
            self._dues.settled(piece.row, piece.offset, piece.count)

    def drops(self) -> list[Place]:
        return self._dues.drops()

    def next_look_ms(self, now_ms: int, wall_ms: int) -> int | None:
        if not self._is_open:
            return None
        at_ms = self._dues.next_look_ms(wall_ms)
        return None if at_ms is None else now_ms + max(0, at_ms - wall_ms)

    # --- what people see --------------------------------------------------------------------------------------

    @property
    def is_writing(self) -> bool:
        return bool(self._to_defer or self._to_move or self._deferring or self._moving)

    def on_their_way(self) -> list[Piece]:
        """To the store, or to another time in it, or being looked up there."""
        kept = (self._to_defer, self._to_move, *self._deferring.values(), *self._moving.values())
        looked = (self._to_look, *self._looking.values())
        return [piece for some in kept for piece, _ in some] + [piece for some in looked for piece in some]

    def in_hand(self) -> dict[int, int]:
        return self._dues.in_hand_by_partition()


def answer_of_store(
    store: DelayStore, effect: m.Defer | m.MoveDelayed | m.EnqueueDue | m.LoadDue | m.FetchDue | m.LookUp
) -> m.Event:
    """Perform an effect at once; the event that answers it."""
    match effect:
        case m.Defer(ticket, tasks):
            store.defer(tasks)
            return m.Deferred(ticket)
        case m.MoveDelayed(ticket, moves):
            for places, due_ms, was_ms in moves:
                store.move(places, due_ms, was_ms)
            return m.DelayedMoved(ticket)
        case m.EnqueueDue(rows):
            appended = store.enqueue(rows)
            partitions = frozenset(place.partition for place in appended)
            return m.DueEnqueued(effect, partitions, tuple(store.fetch(rows)))
        case m.LoadDue(partition, _, until_ms, after, limit):
            return m.DueLoaded(effect, tuple(store.due((partition,), until_ms, after, limit)))
        case m.FetchDue(rows):
            return m.DueFetched(effect, tuple(store.fetch(rows)))
        case m.LookUp(ticket, places):
            return m.LookedUp(ticket, tuple(row for place in places for row in store.standing(place)))


def _way(batch: TaskBatch) -> str:
    return ENQUEUE if batch.then == ENQUEUE else RUN


def _deferral(piece: Piece, due_ms: int) -> Deferral:
    whole = piece.at == 0 and piece.count == len(piece.batch)
    batch = piece.batch if whole else piece.batch.part(piece.at, piece.count)
    return Deferral(piece.partition, piece.offset, due_ms, _way(batch), batch)
