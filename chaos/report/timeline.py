"""The timeline: a lane for each node (leadership, faults, claims, effects, suspects) and for each link."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from chaos import history as h
from chaos.history import History
from chaos.report.svg import LEFT, WIDTH, Plane
from dedup.ids import TaskId, id_text
from raft.commands import Outcome, Verdict

S = 1_000_000_000
TOP = 22
NODE_HEIGHT, LINK_HEIGHT, GAP = 66, 24, 10


@dataclass(frozen=True)
class Span:
    begin_ns: int
    end_ns: int
    text: str
    where: tuple[str, ...] = ()


@dataclass(frozen=True)
class Window:
    """The time that is shown."""

    begin_ns: int
    end_ns: int

    def s(self, at_ns: int) -> float:
        return (at_ns - self.begin_ns) / S

    @property
    def seconds(self) -> float:
        return self.s(self.end_ns)


def window(history: History) -> Window:
    """From the first submit or fault to the last that happened."""
    moments = [
        each.t_ns
        for events in (history.submitted.values(), history.effects, history.faults, history.leaders)
        for each in events
        if each.t_ns
    ]
    begun = [each.t_ns for each in history.submitted.values() if each.t_ns] or moments
    if not moments:
        return Window(0, S)
    return Window(min(begun) - S // 4, max(moments) + S // 4)


def fault_spans(history: History, end_ns: int) -> list[Span]:
    standing: dict[tuple[str, tuple[str, ...]], int] = {}
    spans = []
    for each in history.faults:
        key = (each.name, each.where)
        if each.kind == "FAULT":
            standing[key] = each.t_ns
        elif key in standing:
            spans.append(Span(standing.pop(key), each.t_ns, each.name, each.where))
    spans += [Span(since, end_ns, f"{name}, not healed", where) for (name, where), since in standing.items()]
    return spans


def lead_spans(history: History, end_ns: int) -> list[Span]:
    leading: dict[str, h.Led] = {}
    spans = []
    for each in sorted(history.leaders, key=lambda one: one.t_ns):
        former = leading.pop(each.node, None)
        if former is not None:
            spans.append(Span(former.t_ns, each.t_ns, f"led term {former.term}", (each.node,)))
        if each.leads:
            leading[each.node] = each
    spans += [Span(each.t_ns, end_ns, f"leads term {each.term}", (node,)) for node, each in leading.items()]
    return spans


def holders(history: History) -> dict[tuple[TaskId, int], str]:
    """The node of each claim."""
    return {
        (each.id, each.fence): each.process.partition("/")[0]
        for each in history.operations
        if each.kind == "CLAIM" and each.outcome is Outcome.GRANTED
    }


def timeline(history: History, shown: Window) -> str:
    nodes = sorted({name for each in history.leaders for name in (each.node,)} | _named(history)) or ["n1"]
    links = sorted({f"{b}-{a}" for a in nodes for b in nodes if a < b})
    height = TOP + len(nodes) * (NODE_HEIGHT + GAP) + len(links) * (LINK_HEIGHT + 4) + 30
    plane = Plane(shown.seconds, height)
    bottom = height - 24
    plane.time_axis(TOP - 8, bottom)
    tops = {node: TOP + at * (NODE_HEIGHT + GAP) for at, node in enumerate(nodes)}
    below = TOP + len(nodes) * (NODE_HEIGHT + GAP)
    tops |= {link: below + at * (LINK_HEIGHT + 4) for at, link in enumerate(links)}
    for name, top in tops.items():
        lane_height = NODE_HEIGHT if name in nodes else LINK_HEIGHT
        plane.box(0, shown.seconds, top, lane_height, "lane")
        plane.text(LEFT - 10, top + lane_height / 2 + 4, name.replace("-", " → "), "name", "end")
    _faults(plane, history, shown, tops, nodes)
    _nodes(plane, history, shown, {node: tops[node] for node in nodes})
    _suspects(plane, history, shown, tops)
    plane.line(LEFT, bottom, WIDTH - 16, bottom, "axis")
    return plane.svg("Timeline of nodes and links")


def _named(history: History) -> set[str]:
    return {each.process.partition("/")[0] for each in history.operations}


def _faults(plane: Plane, history: History, shown: Window, tops: dict[str, int], nodes: list[str]) -> None:
    for span in fault_spans(history, shown.end_ns):
        begin, end = shown.s(span.begin_ns), shown.s(span.end_ns)
        for where in span.where or tuple(nodes):
            if where not in tops:
                continue
            height = NODE_HEIGHT if where in nodes else LINK_HEIGHT
            title = f"{span.text}: {where}, {begin:.2f} s to {end:.2f} s"
            plane.box(begin, end, tops[where], height, "fault", title, least=2)
            if plane.x(end) - plane.x(begin) > 7 * len(span.text) and where == span.where[-1]:
                plane.text(
                    plane.x(begin) + 5, tops[where] + (12 if where in nodes else 16), span.text, "said"
                )


def _nodes(plane: Plane, history: History, shown: Window, tops: dict[str, int]) -> None:
    for span in lead_spans(history, shown.end_ns):
        if span.end_ns > shown.begin_ns and span.where[0] in tops:
            y = tops[span.where[0]] + NODE_HEIGHT - 8
            begin, end = max(0.0, shown.s(span.begin_ns)), shown.s(span.end_ns)
            plane.box(begin, end, y, 6, "leads", f"{span.where[0]} {span.text}")
    claims: dict[str, list[float]] = defaultdict(list)
    effects: dict[str, list[float]] = defaultdict(list)
    whose = holders(history)
    for each in history.operations:
        if each.kind == "CLAIM" and each.outcome is Outcome.GRANTED:
            claims[each.process.partition("/")[0]].append(shown.s(each.returned_ns))
    for effect in history.effects:
        effects[whose.get((effect.id, effect.fence), "")].append(shown.s(effect.t_ns))
    for node, top in tops.items():
        plane.ticks(claims[node], top + 18, 14, "claim")
        plane.ticks(effects[node], top + 36, 14, "effect")


def _suspects(plane: Plane, history: History, shown: Window, tops: dict[str, int]) -> None:
    for doubt in doubts(history):
        if doubt.node in tops and doubt.suspected_ns:
            begin = shown.s(doubt.suspected_ns)
            y = tops[doubt.node] + 9
            if doubt.resolved_ns:
                plane.box(begin, shown.s(doubt.resolved_ns), y - 1, 2, "doubt")
                plane.mark(shown.s(doubt.resolved_ns), y, "resolved", doubt.sentence)
            plane.mark(begin, y, "suspect", doubt.sentence)


@dataclass
class Doubt:
    id: TaskId
    fence: int
    node: str
    why: str
    suspected_ns: int
    facts: list[str]
    resolved_ns: int = 0
    verdict: str = ""
    by: str = ""

    @property
    def sentence(self) -> str:
        end = f"{self.verdict} by {self.by}" if self.verdict else "open"
        return f"{id_text(self.id)} under {self.fence}: {self.why} on {self.node}; {end}"


def doubts(history: History) -> list[Doubt]:
    """Every suspect, and what became of it."""
    found: dict[tuple[TaskId, int], Doubt] = {}
    for each in history.decisions:
        match each:
            case h.Suspected(id=task, fence=fence, node=node, why=why, t_ns=t_ns):
                found[task, fence] = Doubt(task, fence, node, why, t_ns, [])
            case h.Testified(id=task, fence=fence, fact=fact) if (task, fence) in found:
                found[task, fence].facts.append(fact.name.lower().replace("_", " "))
            case h.Ruled(id=task, fence=fence, verdict=verdict, by=by, t_ns=t_ns) if (task, fence) in found:
                doubt = found[task, fence]
                doubt.verdict, doubt.by = verdict.name.lower().replace("_", " "), by
                doubt.resolved_ns = t_ns if verdict is not Verdict.HELD else 0
            case _:
                pass
    return list(found.values())
