"""``history.jsonl``: a history as one event a line, in the order of time, for any checker to read (docs/chaos.md).

Reading gives back what was written, so a run can be judged again where and when one likes. Events without a known
time (``t_ns`` 0) stand first, in their own order; within one time the order of witnessing is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from chaos import history as h
from chaos.history import History
from dedup.ids import id_text, parse_id
from raft.commands import Fact, Outcome, Result, Verdict


class Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is empty is left out. ``outcome`` is what was decided, answered or testified, in words."""

    t_ns: int
    process: str
    kind: str
    phase: str = ""
    id: str = ""
    fence: int = 0
    index: int = 0
    outcome: str = ""
    op: int = 0
    session: int = 0
    attempt: int = 0
    incarnation: int = 0
    node: str = ""
    by: str = ""
    policy: str = ""
    pid: int = 0
    term: int = 0
    partition: int = -1
    offset: int = -1
    due_ns: int = 0
    until_ns: int = 0
    where: tuple[str, ...] = ()
    counts: dict[str, int] = {}


def _word(value: Outcome | Result | Fact | Verdict) -> str:
    return value.name.lower()


# --- writing ------------------------------------------------------------------------------------------------------


def lines(history: History) -> list[Line]:
    found = [line for gather in (_clients, _sink, _decided, _asked, _observed) for line in gather(history)]
    found.sort(key=lambda line: line.t_ns)
    return found


def write(history: History, path: Path) -> None:
    encode = msgspec.json.Encoder().encode
    with path.open("wb") as file:
        file.writelines(encode(line) + b"\n" for line in lines(history))


def _clients(history: History) -> Iterator[Line]:
    for each in history.submitted.values():
        yield Line(
            t_ns=each.t_ns,
            process="client",
            kind="SUBMIT",
            id=id_text(each.id),
            policy=each.policy,
            due_ns=each.due_ns,
            outcome="ok" if each.acknowledged else "unknown",
        )
    for refused in history.refused:
        yield Line(t_ns=refused.t_ns, process="client", kind="SUBMIT", outcome="failed", by=refused.why)
    for told in history.cancels:
        yield Line(t_ns=told.t_ns, process="client", kind="CANCEL", id=id_text(told.id), outcome="ok")


def _sink(history: History) -> Iterator[Line]:
    moments: tuple[tuple[str, Iterable[h.Started | h.Effect]], ...] = (
        ("START", history.starts),
        ("EFFECT", history.effects),
    )
    for kind, events in moments:
        for each in events:
            yield Line(
                t_ns=each.t_ns, process="sink", kind=kind, id=id_text(each.id), fence=each.fence, pid=each.pid
            )


def _decided(history: History) -> Iterator[Line]:
    for each in history.decisions:
        common: dict[str, Any] = {"t_ns": each.t_ns, "process": "ledger", "id": id_text(each.id)}
        common["index"] = each.index
        match each:
            case h.Claimed(fence=fence, attempt=attempt, session=session):
                yield Line(**common, kind="CLAIM", fence=fence, attempt=attempt, session=session)
            case h.Settled(fence=fence, result=result):
                yield Line(
                    **common,
                    kind="DEAD" if result is Result.DEAD else "SETTLE",
                    fence=fence,
                    outcome=_word(result),
                )
            case h.Suspected(fence=fence, node=node, incarnation=incarnation, why=why):
                yield Line(
                    **common, kind="SUSPECT", fence=fence, node=node, incarnation=incarnation, outcome=why
                )
            case h.Testified(fence=fence, node=node, fact=fact):
                yield Line(**common, kind="TESTIMONY", fence=fence, node=node, outcome=_word(fact))
            case h.Ruled(fence=fence, verdict=verdict, by=by):
                yield Line(**common, kind="RULE", fence=fence, outcome=_word(verdict), by=by)
            case h.Cancelled():
                yield Line(**common, kind="CANCEL")
            case h.Revived():
                yield Line(**common, kind="REVIVE")


def _asked(history: History) -> Iterator[Line]:
    for each in history.operations:
        common: dict[str, Any] = {"process": each.process, "kind": each.kind, "op": each.op}
        common |= {"id": id_text(each.id), "session": each.session}
        if each.kind == "SETTLE":
            common |= {"fence": each.fence}
        by = _word(each.result) if each.result else ""
        yield Line(**common, t_ns=each.called_ns, phase="call", by=by)
        if each.outcome is None:
            continue
        if each.kind == "CLAIM":
            common |= {"fence": each.fence}
        yield Line(**common, t_ns=each.returned_ns, phase="return", outcome=_word(each.outcome))
    for lease in history.leases:
        yield Line(
            t_ns=lease.t_ns, process=lease.node, kind="LEASE", session=lease.session, until_ns=lease.until_ns
        )


def _observed(history: History) -> Iterator[Line]:
    for placed in history.placed:
        yield Line(
            t_ns=0,
            process="log",
            kind="PLACED",
            id=id_text(placed.id),
            partition=placed.partition,
            offset=placed.offset,
        )
    for aside in history.aside:
        yield Line(t_ns=0, process="log", kind="ASIDE", id=id_text(aside))
    for position in history.positions:
        yield Line(
            t_ns=position.t_ns,
            process="log",
            kind="COMMIT",
            partition=position.partition,
            offset=position.committed,
        )
    for digest in history.digests:
        yield Line(
            t_ns=digest.t_ns, process=digest.who, kind="DIGEST", index=digest.index, outcome=digest.digest
        )
    for fault in history.faults:
        yield Line(t_ns=fault.t_ns, process="driver", kind=fault.kind, outcome=fault.name, where=fault.where)
    for led in history.leaders:
        outcome = "leads" if led.leads else "ended"
        yield Line(t_ns=led.t_ns, process=led.node, kind="LEADER", term=led.term, outcome=outcome)
    for memory in history.memory:
        yield Line(t_ns=memory.t_ns, process=memory.node, kind="MEMORY", counts={"bytes": memory.bytes})
    for promise in history.promises:
        counts = {"tasks": promise.tasks, "within_ns": promise.within_ns, "bytes": promise.memory_bytes_max}
        yield Line(t_ns=promise.since_ns, process="driver", kind="PROMISE", counts=counts)
    if not history.sink_is_exact:
        yield Line(t_ns=0, process="sink", kind="SINK", outcome="around")
    for kind, shown in (("COUNTED", history.counted), ("KEPT", history.kept)):
        if shown is not None:
            yield Line(t_ns=0, process="driver", kind=kind, counts=msgspec.structs.asdict(shown))


# --- reading ------------------------------------------------------------------------------------------------------


def read(path: Path) -> History:
    decode = msgspec.json.Decoder(Line).decode
    with path.open("rb") as file:
        return history_of(decode(line) for line in file)


def history_of(found: Iterable[Line]) -> History:
    history = History()
    calls: dict[tuple[str, str, int, str], Line] = {}
    for line in found:
        if line.phase == "call":
            calls[line.process, line.kind, line.op, line.id] = line
        elif line.phase == "return":
            called = calls.pop((line.process, line.kind, line.op, line.id))
            history.operations.append(_operation(called, line))
        elif line.process == "ledger":
            history.decisions.append(_DECISIONS[line.kind](line))
        else:
            _take(history, line)
    history.operations += [_operation(each, None) for each in calls.values()]
    # The ledger's own order is that of its index; several decisions of one entry keep their places.
    history.decisions.sort(key=lambda each: each.index)
    return history


def _operation(call: Line, answer: Line | None) -> h.Operation:
    return h.Operation(
        call.process,
        call.op,
        call.kind,
        parse_id(call.id),
        call.session,
        call.t_ns,
        returned_ns=answer.t_ns if answer else 0,
        fence=answer.fence if answer else call.fence,
        result=Result[call.by.upper()] if call.by else None,
        outcome=Outcome[answer.outcome.upper()] if answer else None,
    )


def _settled(line: Line) -> h.Settled:
    return h.Settled(line.index, parse_id(line.id), line.fence, Result[line.outcome.upper()], line.t_ns)


_DECISIONS: dict[str, Callable[[Line], h.Decision]] = {
    "CLAIM": lambda e: h.Claimed(e.index, parse_id(e.id), e.fence, e.attempt, e.session, e.t_ns),
    "SETTLE": _settled,
    "DEAD": _settled,
    "SUSPECT": lambda e: h.Suspected(
        e.index, parse_id(e.id), e.fence, e.node, e.incarnation, e.outcome, e.t_ns
    ),
    "TESTIMONY": lambda e: h.Testified(
        e.index, parse_id(e.id), e.fence, e.node, Fact[e.outcome.upper()], e.t_ns
    ),
    "RULE": lambda e: h.Ruled(e.index, parse_id(e.id), e.fence, Verdict[e.outcome.upper()], e.by, e.t_ns),
    "CANCEL": lambda e: h.Cancelled(e.index, parse_id(e.id), e.t_ns),
    "REVIVE": lambda e: h.Revived(e.index, parse_id(e.id), e.t_ns),
}


def _take(history: History, e: Line) -> None:
    match e.kind:
        case "SUBMIT" if e.outcome == "failed":
            history.refused.append(h.SubmitFailed(e.t_ns, e.by))
        case "SUBMIT":
            task = h.Submitted(parse_id(e.id), e.policy, e.outcome == "ok", e.t_ns, e.due_ns)
            history.submitted[task.id] = task
        case "CANCEL":
            history.cancels.append(h.CancelTold(parse_id(e.id), e.t_ns))
        case "START":
            history.starts.append(h.Started(parse_id(e.id), e.fence, e.pid, e.t_ns))
        case "EFFECT":
            history.effects.append(h.Effect(parse_id(e.id), e.fence, e.pid, e.t_ns))
        case "LEASE":
            history.leases.append(h.Lease(e.t_ns, e.process, e.session, e.until_ns))
        case "PLACED":
            history.placed.append(h.Placed(e.partition, e.offset, parse_id(e.id)))
        case "ASIDE":
            history.aside.add(parse_id(e.id))
        case "COMMIT":
            history.positions.append(h.Position(e.partition, e.offset, e.t_ns))
        case "DIGEST":
            history.digests.append(h.Digest(e.process, e.index, e.outcome, e.t_ns))
        case "FAULT" | "HEAL":
            history.faults.append(h.Fault(e.t_ns, e.kind, e.outcome, e.where))
        case "LEADER":
            history.leaders.append(h.Led(e.t_ns, e.process, e.term, e.outcome == "leads"))
        case "MEMORY":
            history.memory.append(h.Memory(e.t_ns, e.process, e.counts["bytes"]))
        case "PROMISE":
            counts = e.counts
            history.promises.append(h.Promise(e.t_ns, counts["within_ns"], counts["tasks"], counts["bytes"]))
        case "SINK":
            history.sink_is_exact = e.outcome == "exact"
        case "COUNTED":
            history.counted = h.Counted(**e.counts)
        case "KEPT":
            history.kept = h.Kept(**e.counts)
        case _:
            raise ValueError(f"kind={e.kind!r} is none that a history has")
