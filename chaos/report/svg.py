"""A little SVG: shapes in a plane whose horizontal axis is time in seconds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

WIDTH = 1120
LEFT, RIGHT = 92, 16  # room for the lanes' names, and at the end


class Plane:
    """Collects shapes; ``x`` maps seconds to pixels."""

    def __init__(self, seconds: float, height: int) -> None:
        self.seconds = max(seconds, 0.1)
        self.height = height
        self.shapes: list[str] = []

    def x(self, at_s: float) -> float:
        inside = WIDTH - LEFT - RIGHT
        return round(LEFT + min(max(at_s, 0.0), self.seconds) / self.seconds * inside, 1)

    def box(
        self,
        begin_s: float,
        end_s: float,
        y: float,
        height: float,
        kind: str,
        title: str = "",
        least: float = 1.5,
    ) -> None:
        left = self.x(begin_s)
        width = max(self.x(end_s) - left, least)
        self.shapes.append(
            f'<rect x="{left}" y="{y:g}" width="{width:.1f}" height="{height:g}" class="{kind}">'
            f"{_title(title)}</rect>"
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        self.shapes.append(f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" class="{kind}"/>')

    def text(self, x: float, y: float, words: str, kind: str, anchor: str = "start") -> None:
        self.shapes.append(
            f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'
        )

    def mark(self, at_s: float, y: float, kind: str, title: str) -> None:
        """A diamond."""
        x, r = self.x(at_s), 4
        points = f"{x},{y - r} {x + r},{y} {x},{y + r} {x - r},{y}"
        self.shapes.append(f'<polygon points="{points}" class="{kind}">{_title(title)}</polygon>')

    def ticks(self, moments_s: Iterable[float], y: float, height: float, kind: str) -> None:
        """One thin stroke a pixel column that has any; its darkness grows with their number."""
        columns: dict[int, int] = {}
        for at_s in moments_s:
            column = int(self.x(at_s))
            columns[column] = columns.get(column, 0) + 1
        for least, most, step in ((1, 1, "few"), (2, 4, "some"), (5, 1 << 30, "many")):
            chosen = sorted(column for column, count in columns.items() if least <= count <= most)
            path = "".join(f"M{column} {y:g}v{height:g}" for column in chosen)
            if path:
                self.shapes.append(f'<path d="{path}" class="{kind} {step}"/>')

    def polyline(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        if len(points) == 1:
            points = [points[0], (points[0][0] + 1, points[0][1])]
        text = " ".join(f"{x:g},{y:.1f}" for x, y in points)
        self.shapes.append(f'<polyline points="{text}" class="{kind}"/>')

    def time_axis(self, top: float, bottom: float) -> None:
        step = _step(self.seconds)
        at = 0.0
        while at <= self.seconds + 1e-9:
            x = self.x(at)
            self.line(x, top, x, bottom, "grid")
            self.text(x, bottom + 14, f"{at:g} s", "tick", "middle")
            at += step

    def svg(self, label: str) -> str:
        inside = "".join(self.shapes)
        return (
            f'<svg viewBox="0 0 {WIDTH} {self.height}" role="img" aria-label="{escape(label)}" '
            f'preserveAspectRatio="xMinYMin meet">{inside}</svg>'
        )


def _title(words: str) -> str:
    return f"<title>{escape(words)}</title>" if words else ""


def _step(seconds: float) -> float:
    """So that there are six to twelve marks, at round numbers."""
    rough = seconds / 10
    power: float = 10.0 ** math.floor(math.log10(rough))
    return next(power * each for each in (1, 2, 5, 10) if power * each >= rough)


def round_up(value: float) -> float:
    """The next of 1, 2 or 5 times a power of ten: where a scale may end."""
    if value <= 0:
        return 1.0
    power: float = 10.0 ** math.floor(math.log10(value))
    return next(power * each for each in (1, 2, 5, 10) if power * each >= value)
