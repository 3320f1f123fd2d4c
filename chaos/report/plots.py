"""Throughput and latency over the time of a run, with the faults behind them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

from chaos.history import History
from chaos.report.svg import LEFT, RIGHT, WIDTH, Plane, round_up
from chaos.report.timeline import Window, fault_spans

MS = 1_000_000
TOP, HEIGHT = 14, 150
BINS = 120
TICKS = 4


def throughput(history: History, shown: Window) -> str:
    """Submits and effects a second."""
    bin_s = max(shown.seconds / BINS, 0.1)
    submits = _rates((shown.s(each.t_ns) for each in history.submitted.values() if each.t_ns), bin_s)
    effects = _rates((shown.s(each.t_ns) for each in history.effects if each.t_ns), bin_s)
    count = int(shown.seconds / bin_s) + 1
    most = round_up(max([*submits.values(), *effects.values(), 1.0]))
    plane = _plane(history, shown, most, lambda value: f"{value:g}/s")
    for rates, kind in ((submits, "submits"), (effects, "effects")):
        points = [
            (plane.x((at + 0.5) * bin_s), _y(rates.get(at, 0.0), most))
            for at in range(count)
            if (at + 0.5) * bin_s <= shown.seconds
        ]
        plane.polyline(points, f"curve {kind}")
    return plane.svg("Throughput")


def latency(history: History, shown: Window) -> str:
    """From submit to effect, by the time of the submit: the median and the slowest of each moment."""
    bin_s = max(shown.seconds / BINS, 0.1)
    first: dict[object, int] = {}
    for effect in history.effects:
        if effect.t_ns:
            first.setdefault(effect.id, effect.t_ns)
    binned: dict[int, list[float]] = defaultdict(list)
    for each in history.submitted.values():
        if each.t_ns and each.id in first:
            binned[int(shown.s(each.t_ns) / bin_s)].append(max(0.0, (first[each.id] - each.t_ns) / MS))
    worst = {at: max(values) for at, values in binned.items()}
    median = {at: sorted(values)[len(values) // 2] for at, values in binned.items()}
    most = round_up(max([*worst.values(), 1.0]))
    plane = _plane(
        history, shown, most, lambda value: f"{value:g} ms" if most < 1000 else f"{value / 1000:g} s"
    )
    for values, kind in ((worst, "slowest"), (median, "median")):
        points = [(plane.x((at + 0.5) * bin_s), _y(values[at], most)) for at in sorted(values)]
        if points:
            plane.polyline(points, f"curve {kind}")
    return plane.svg("Latency")


def _rates(moments: object, bin_s: float) -> Mapping[int, float]:
    found: dict[int, float] = defaultdict(float)
    for at_s in moments:  # type: ignore[attr-defined]
        found[int(at_s / bin_s)] += 1 / bin_s
    return found


def _y(value: float, most: float) -> float:
    return TOP + HEIGHT * (1 - value / most)


def _plane(history: History, shown: Window, most: float, name: Callable[[float], str]) -> Plane:
    plane = Plane(shown.seconds, TOP + HEIGHT + 26)
    for span in fault_spans(history, shown.end_ns):
        plane.box(shown.s(span.begin_ns), shown.s(span.end_ns), TOP, HEIGHT, "fault", span.text, least=2)
    plane.time_axis(TOP, TOP + HEIGHT)
    for at in range(TICKS + 1):
        value = most * at / TICKS
        y = _y(value, most)
        plane.line(LEFT, y, WIDTH - RIGHT, y, "grid" if at else "axis")
        plane.text(LEFT - 10, y + 4, name(value), "tick", "end")
    return plane
