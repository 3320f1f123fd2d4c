"""What one node does with its share of the log, decided without doing any of it (pure).

    log -> ready -> claiming -> running -> closing -> settled -> position moves
             ^         |           |          |
             +------ waiting <-----+----------+      waiting: held elsewhere, or due soon
             +---- store <- deferred (deferring.py)  due later: the position passes, the store gives it back
                     doubted -> (testimony, check, policy: doubt.py) -> ready | settled

``on(event)`` returns effects; the service performs them and brings back what came of them. Rules that hold:

- a task is dispatched only under a fence that the ledger granted to the session that is open now;
- an id is in this node's hands at most once (hands.py);
- a position moves over a task only when the ledger has it executed, dead or cancelled, or when it was durably put
  aside, or handed on until it is due. Settle first, then commit: the reverse order loses the task on a crash.
  Executed is for good. Dead, cancelled and held are not: somebody may have revived the task, or ruled on it, and
  appended it again, which is what we read, while the ledger here is still behind. So those are believed only
  after a confirmation;
- one proposal carries all settlements and claims that have gathered; at most ``proposals_max`` are in flight,
  so batches are small when the node is idle and grow by themselves under load.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import assert_never

from node import messages as m
from node.asides import Asides
from node.deferring import DEFERRING_MAX, Deferring, Found, due_by_message, is_far_retry, is_kept
from node.doubt import Doubts
from node.hands import Hands
from node.lanes import Lanes
from node.partitions import Partitions
from node.pieces import Piece, SpanReader, gather_ids, is_keyed, share_out
from node.records_model import Attempt
from node.settling import Closing, Closings, closings_of
from node.tickets import Ticket, Tickets
from node.undecodable import Undecodables
from node.views import CoordinatorSettings, LedgerReads, PartitionView
from node.workers.port import Ended, HandlerInfo, Report
from node.working import Working
from oncekeeper.log.delayed import Place
from oncekeeper.log.port import Gap, Undecodable
from raft.commands import Answered, Claim, Command, Outcome, Result, Settle, Span

DUE_LOOK_MS = 10_000


class Coordinator:
    def __init__(self, ledger: LedgerReads, settings: CoordinatorSettings) -> None:
        self._ledger = ledger
        self._settings = settings
        self._lanes = Lanes(settings)
        self.session = 0
        self._draining = False
        self._numbers = itertools.count(1)
        self._partitions = Partitions(settings)
        self._hands = Hands()
        self._tickets = Tickets()
        self._working = Working(settings, self._numbers)
        self._closings = Closings()
        self._unsure: list[Piece] = []
        self._confirming: dict[int, list[Piece]] = {}
        self._doubts = Doubts(ledger, settings, self._numbers)
        self._undecodables = Undecodables()
        self._asides = Asides(self._numbers, self._undecodables)
        self._delays: Deferring | None = None
        self._effects: list[m.Effect] = []
        self._now_ms = 0
        self._wall_ms = 0
        self.settled_tasks = 0

    # --- events -----------------------------------------------------------------------------------------------

    def on(self, event: m.Event, now_ms: int, wall_ms: int) -> list[m.Effect]:
        """``now_ms``: a monotonic clock of the machine; ``wall_ms``: its epoch clock (due times, history)."""
        self._now_ms, self._wall_ms = now_ms, wall_ms
        if self._delays is None and self._settings.delays:
            self._delays = Deferring(self._partitions, self._numbers, wall_ms)
        match event:
            case m.SessionOpened(session):
                self.session = session
            case m.SessionLost():
                self.session = 0
            case m.Assigned(positions):
                self._assign(positions)
            case m.HandlersKnown(handlers, slots):
                self._lanes.know(handlers, slots)
                self._doubts.handlers = handlers
            case m.WasRead():
                self._was_read(event)
            case m.MoreToRead(partitions):
                self._partitions.more(partitions)
            case m.Answers(ticket, answers):
                self._answered(self._tickets.take(ticket), answers)
            case m.Reported(reports):
                for report in reports:
                    self._reported(report)
            case m.AsideStored(ticket):
                self._aside_stored(ticket)
            case m.Confirmed(ticket):
                self._confirmed(self._confirming.pop(ticket))
            case (
                m.Deferred()
                | m.DelayedMoved()
                | m.DueLoaded()
                | m.DueFetched()
                | m.DueEnqueued()
                | m.LookedUp()
            ):
                self._stored(event)
            case m.DelaysChanged(partitions):
                self._delays_changed(partitions)
            case m.Tick():
                pass
            case m.Drain():
                self._draining = True
            case _:
                assert_never(event)
        for piece in self._partitions.due(now_ms):
            self._back(piece)
        self._pump()
        effects, self._effects = self._effects, []
        return effects

    def next_look_ms(self) -> int | None:
        """When a Tick is wanted for what waits by time; None: nothing waits by time."""
        times = [self._partitions.next_due_ms(), self._doubts.next_look_ms()]
        if self._delays is not None:
            times.append(self._delays.next_look_ms(self._now_ms, self._wall_ms))
        return min((time for time in times if time is not None), default=None)

    def wants(self, read: m.Read) -> bool:
        """Whether the partition is still owned as it was when the read was asked for."""
        return self._partitions.is_current(read.partition, read.epoch)

    def commit_positions(self) -> dict[int, int]:
        """What moved since the last call; asked for by time, because a position a task were a write a task."""
        return self._partitions.moved()

    def delayed_drops(self) -> list[Place]:
        """What the store of delayed tasks may forget, since the last call; asked for as positions are."""
        return self._delays.drops() if self._delays is not None else []

    # --- what is read -----------------------------------------------------------------------------------------

    def _assign(self, positions: Mapping[int, int]) -> None:
        gone = self._partitions.assign(positions)
        if gone:
            for lane in self._lanes:
                lane.drop(gone)
            self._doubts.drop(gone)
        if self._delays is not None:
            self._delays.assign()

    def _was_read(self, event: m.WasRead) -> None:
        if not self._partitions.was_read(event):
            return
        for item in event.items:
            if isinstance(item, Gap):
                self._partitions.passed(event.partition, item)
                continue
            batch = self._undecodables.batch(item) if isinstance(item, Undecodable) else item.batch
            self._intake(Piece(event.partition, event.epoch, item.base, batch, 0, len(batch)))

    def _intake(self, piece: Piece) -> None:
        """Sort a piece by what the local replica knows. Being behind is harmless: the claim decides."""
        for part, span in share_out((piece,), self._ledger.classify(piece.ids)):
            if span.outcome in (Outcome.DEAD, Outcome.CANCELLED):
                self._unsure.append(part)
            else:
                self._route(part, span)

    def _back(self, piece: Piece) -> None:
        """Sort a piece that was in hand before; one that came from the store is looked up there first."""
        if piece.row is None or self._delays is None:
            self._intake(piece)
        else:
            self._delays.again(piece)

    def _stored(
        self,
        event: m.Deferred | m.DelayedMoved | m.DueLoaded | m.DueFetched | m.DueEnqueued | m.LookedUp,
    ) -> None:
        """An answer of the store of delayed tasks."""
        if self._delays is None:
            return
        match event:
            case m.Deferred(ticket):
                for piece in self._delays.deferred(ticket):
                    for part, span in share_out((piece,), self._ledger.classify(piece.ids)):
                        if span.outcome is Outcome.CANCELLED:
                            self._delays.cancelled(part)
            case m.DelayedMoved(ticket):
                self._delays.moved(ticket)
            case m.DueLoaded():
                self._delays.loaded(event)
            case m.DueEnqueued():
                self._take_due(self._delays.enqueued(event))
            case m.DueFetched():
                self._take_due(self._delays.fetched(event))
            case m.LookedUp():
                for piece in self._delays.looked_up(event):
                    self._lanes.of(piece).push(piece)

    def _take_due(self, due: list[Found]) -> None:
        for found in due:
            row, item = found.row, found.item
            batch = self._undecodables.batch(item) if isinstance(item, Undecodable) else item.batch
            self._intake(Piece(row.partition, found.epoch, row.offset, batch, 0, row.count, row))

    def _delays_changed(self, partitions: frozenset[int]) -> None:
        if self._delays is None:
            return
        for lane in self._lanes:
            for piece in lane.drop_due(partitions):
                self._delays.again(piece)
        for piece in self._partitions.take_early(partitions):  # a reschedule that came to nothing held them
            self._back(piece)
        self._delays.changed(partitions)

    def _settled(self, piece: Piece) -> None:
        """The ledger has it executed, dead or cancelled, or it was put aside."""
        if piece.row is None:
            self._partitions.settled(piece)
        elif self._delays is not None:
            self._delays.settled(piece)

    def _confirmed(self, pieces: list[Piece]) -> None:
        """What the ledger says of these now, it said of them after they were read."""
        for piece in pieces:
            for part, span in share_out((piece,), self._ledger.classify(piece.ids)):
                if span.outcome is Outcome.SUSPECT:
                    self._confirmed_suspects(part)
                else:
                    self._route(part, span)

    def _confirmed_suspects(self, piece: Piece) -> None:
        at = 0
        for count, suspect in self._ledger.suspicions(piece.ids):
            part = piece.part(at, count)
            at += count
            if suspect is not None and suspect.held_by:
                self._settled(part)  # it was put aside before it was held
            else:
                self._back(part)

    def _route(self, piece: Piece, span: Span) -> None:
        if self._delays is not None and self._is_for_store(piece, span):
            early_ms = self._wall_ms + span.detail if span.outcome is Outcome.EARLY else 0
            self._delays.hand_on(piece, max(early_ms, due_by_message(piece)))
            return
        match span.outcome:
            case Outcome.NEW | Outcome.UNALLOCATED | Outcome.GRANTED:
                # Unallocated here may only mean that this replica is behind: the claim's answer is final.
                wait_ms = due_by_message(piece) - self._wall_ms
                if wait_ms > 0:
                    # Not for all of the wait: a wall clock that was wrong when we looked may be right by then.
                    self._wait(piece, min(wait_ms, DUE_LOOK_MS), Outcome.NEW)
                elif piece.row is None and piece.is_delayed and self._delays is not None:
                    self._delays.look_up(piece)
                else:
                    self._lanes.of(piece).push(piece)
            case Outcome.EXECUTED | Outcome.DEAD | Outcome.CANCELLED:
                # A dead one was put aside before it was settled.
                self._settled(piece)
            case Outcome.SUSPECT:
                self._doubts.add(piece, span.fence, self._now_ms)
            case Outcome.EARLY:
                self._wait(piece, max(1, span.detail), Outcome.EARLY)
            case _:  # held by a live session, or an answer that only another look can clear up
                self._wait(piece, self._settings.held_look_ms, Outcome.HELD)

    def _is_for_store(self, piece: Piece, span: Span) -> bool:
        if span.outcome is Outcome.EARLY and is_far_retry(span.detail):
            return True
        closed = span.outcome in (Outcome.EXECUTED, Outcome.DEAD, Outcome.CANCELLED)
        return piece.row is None and not closed and is_kept(piece.batch)

    def _wait(self, piece: Piece, wait_ms: int, why: Outcome) -> None:
        self._partitions.wait(piece, self._now_ms + wait_ms, why)

    # --- asking the ledger ------------------------------------------------------------------------------------

    def _pump(self) -> None:
        self._effects.extend(self._doubts.look(self._now_ms, self.session))
        for piece in self._doubts.returned():
            self._back(piece)
        self._park_held()
        if self._unsure and not self._confirming:
            number = next(self._numbers)
            self._confirming[number], self._unsure = self._unsure, []
            self._effects.append(m.Confirm(number))
        while len(self._tickets) < self._settings.proposals_max and self._propose():
            pass
        self._read_more()

    def _propose(self) -> bool:
        """One proposal with all that has gathered; False: there was nothing."""
        ticket = Ticket(self.session)
        commands: list[Command] = []
        for session, settlements, closings in self._closings.gather():
            commands.append(Settle(session, settlements))
            ticket.settles.append(closings)
        for rule, pieces in self._doubts.rulings():
            commands.append(rule)
            ticket.rulings.append(pieces)
        if self.session and not self._draining:
            for pieces in self._gather_claims():
                commands.append(Claim(self.session, gather_ids(pieces)))
                ticket.claims.append(pieces)
        if not commands:
            return False
        number = next(self._numbers)
        self._tickets.add(number, ticket)
        self._effects.append(m.Propose(number, tuple(commands)))
        return True

    def _gather_claims(self) -> list[list[Piece]]:
        """What may be claimed now: range ids and keyed ids apart, because that is the order of ``Ids``."""
        ranges: list[Piece] = []
        keyed: list[Piece] = []
        paused = self._ledger.paused_queues()
        for lane in self._lanes:
            while (piece := lane.next_piece(paused)) is not None:
                name = piece.batch.handler
                info = self._lanes.info(piece)
                room = lane.room(name, info is not None and info.on_doubt == "rerun", self._now_ms)
                if room <= 0:
                    break
                free, others = self._hands.take(lane.take(min(room, piece.count)))
                for part in others:
                    self._wait(part, self._settings.held_look_ms, Outcome.HELD)
                for part in free:
                    lane.handler(name).outstanding += part.count
                    (keyed if is_keyed(part) else ranges).append(part)
        return [pieces for pieces in (ranges, keyed) if pieces]

    def _answered(self, ticket: Ticket, answers: tuple[object, ...]) -> None:
        rest = iter(answers)
        for closings in ticket.settles:
            self._settle_answered(closings, _spans(next(rest), closings))
        for pieces in ticket.rulings:
            next(rest)
            for piece in pieces:  # whatever the answer was, the ledger has the last word
                self._back(piece)
        for pieces in ticket.claims:
            self._claim_answered(ticket.session, pieces, next(rest))

    def _unclaimed(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            self._closed(piece)
            self._wait(piece, self._settings.held_look_ms, Outcome.HELD)

    def _closed(self, piece: Piece) -> None:
        """A piece leaves this node's hands."""
        self._hands.leave(piece)
        self._lanes.flow(piece).outstanding -= piece.count

    def _claim_answered(self, session: int, pieces: list[Piece], answer: object) -> None:
        if not isinstance(answer, Answered):
            self._unclaimed(pieces)
            return
        for piece, span in share_out(pieces, answer.spans):
            if span.outcome is Outcome.GRANTED:
                self._granted(piece, span, session)
                continue
            self._closed(piece)
            if span.outcome is Outcome.UNALLOCATED:
                self._put_aside("dead", piece, "the id is outside of every range that was allocated")
            elif span.outcome is Outcome.LAPSED:
                self._wait(piece, self._settings.held_look_ms, Outcome.HELD)
            else:
                self._route(piece, span)

    def _granted(self, piece: Piece, span: Span, session: int) -> None:
        info = self._lanes.info(piece)
        closing = Closing(piece, span.fence, session, span.detail, self._wall_ms)
        if session != self.session or self._draining:
            # Never started, and said so: whoever claims it next need not wait for anybody.
            self._closings.append(closing.ended(Result.RELEASED))
        elif info is None:
            unknown = f"handler={piece.batch.handler!r} is not registered by the application"
            self._dead(closing, self._undecodables.reason(piece) or unknown)
        elif span.detail > info.retries + 1 + self._settings.lost_attempts_max:
            self._dead(closing, f"attempt {span.detail}: its worker or node was lost too often")
        else:
            self._dispatch(piece, span, info)

    def _dispatch(self, piece: Piece, span: Span, info: HandlerInfo) -> None:
        lane = self._lanes.of(piece)
        self._effects.extend(self._working.hand_over(piece, span, self.session, info, lane, self._wall_ms))

    # --- what workers report ----------------------------------------------------------------------------------

    def _reported(self, report: Report) -> None:
        if self._doubts.reported(report, self._now_ms):
            return
        flow = self._lanes.flow(self._working.piece(report))
        flow.finished(sum(part.count for part in report.parts), self._now_ms)
        ran = sum(part.count for part in report.parts if part.ended is not Ended.NOT_STARTED)
        if ran and report.busy_us:  # 0: nobody knows how long the tasks of a dead worker took
            flow.measured(ran, report.busy_us)
        for closing, ended in self._working.reported(report):
            self._ended(closing, ended)

    def _ended(self, closing: Closing, ended: Ended) -> None:
        info = self._lanes.handlers[closing.piece.batch.handler]
        if ended is Ended.NOT_STARTED:
            self._not_started(closing, info)
            return
        for each in closings_of(closing, ended, info):
            if each.result is Result.DEAD:
                self._dead(each, each.error)
            else:
                self._closings.append(each)

    def _not_started(self, closing: Closing, info: HandlerInfo) -> None:
        self._effects.append(m.Release(closing.number, closing.number_at, closing.piece.count))
        if closing.session == self.session and not self._draining:
            # The claim still stands: another worker has it under the same fence.
            self._dispatch(
                closing.piece,
                Span(closing.piece.count, Outcome.GRANTED, closing.fence, closing.attempt),
                info,
            )
        else:
            closing.number = 0  # released above
            self._closings.append(closing.ended(Result.RELEASED))

    def _dead(self, closing: Closing, reason: str) -> None:
        """Put aside first, settle then: the reverse order would leave a dead letter without its message."""
        closing.error = closing.error or reason
        self._put_aside("dead", closing.ended(Result.DEAD), reason)

    def _put_aside(self, kind: str, put: Closing | Piece, reason: str) -> None:
        self._effects.append(self._asides.put(kind, put, reason, self._wall_ms))

    def _aside_stored(self, ticket: int) -> None:
        stored = self._asides.stored(ticket)
        if isinstance(stored, Closing):
            self._closings.append(stored)
        elif not self._doubts.parked(
            stored
        ):  # else the ruling "held" follows; its answer passes the position
            self._settled(stored)

    def _park_held(self) -> None:
        for piece, reason in self._doubts.to_park():
            self._put_aside("suspect", piece, reason)
        self._unsure.extend(self._doubts.held())

    def _settle_answered(self, closings: list[Closing], spans: list[Span]) -> None:
        reader = SpanReader(spans)
        ended: list[Attempt] = []
        for closing in closings:
            parts = reader.take(closing.piece)
            if closing.number:
                self._effects.append(m.Release(closing.number, closing.number_at, closing.piece.count))
            self._closed(closing.piece)
            late = any(span.outcome is not Outcome.SETTLED for _, span in parts)
            if closing.result is not Result.RELEASED:
                ended.append(closing.for_history(self._settings.node, late))
            for piece, span in parts:
                self._closed_as(piece, closing, span)
        if ended:
            self._effects.append(m.Remember(tuple(ended)))

    def _closed_as(self, piece: Piece, closing: Closing, span: Span) -> None:
        if span.outcome is Outcome.SETTLED and closing.result in (Result.DONE, Result.DEAD):
            self.settled_tasks += piece.count
            self._settled(piece)
            self._undecodables.settled(piece)
        elif span.outcome is Outcome.SETTLED and closing.result is Result.RETRY:
            if self._delays is not None and is_far_retry(closing.delay_ms):
                self._delays.hand_on(piece, self._wall_ms + closing.delay_ms)
            else:
                self._wait(piece, closing.delay_ms, Outcome.EARLY)
        elif self._partitions.is_ours(piece):
            self._back(piece)  # in doubt, released, lapsed, fenced: the ledger knows

    # --- reading on -------------------------------------------------------------------------------------------

    def _read_more(self) -> None:
        is_open = bool(self.session and not self._draining and self._lanes.handlers)
        room = self._settings.ready_max - self._lanes.ready_tasks
        if self._delays is not None:
            self._effects.extend(self._delays.look(self._now_ms, self._wall_ms, is_open, room))
            room -= self._delays.tasks
            is_open = is_open and self._delays.tasks < DEFERRING_MAX
        if is_open:
            self._effects.extend(self._partitions.reads(room))

    # --- what people see --------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Nothing of this node is running or being settled."""
        writing = self._delays is not None and self._delays.is_writing
        return not (self._working or self._tickets or self._closings or self._asides or writing)

    @property
    def running_tasks(self) -> int:
        return len(self._hands)

    def partition_views(self) -> list[PartitionView]:
        ready = self._lanes.waiting()
        doubted = self._doubts.pieces()
        if self._delays is None:
            return self._partitions.views(ready, (), doubted, {})
        return self._partitions.views(ready, self._delays.on_their_way(), doubted, self._delays.in_hand())

    @property
    def newest_ticket(self) -> int:
        """See ``answered_up_to``."""
        return self._tickets.newest

    def answered_up_to(self, ticket: int) -> bool:
        """Whether all is answered that was asked of the ledger up to then."""
        return self._tickets.answered_up_to(ticket)


def _spans(answer: object, closings: list[Closing]) -> list[Span]:
    if isinstance(answer, Answered):
        return list(answer.spans)
    # The whole command was refused: nothing was taken, and the ledger is asked what stands.
    return [Span(sum(closing.piece.count for closing in closings), Outcome.FENCED)]
