"""What a walk through the crash points of a handler found, for people (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from chaos.testing.places import Place

SOURCE_CHARS = 44

NONE, ONCE, PART, MORE = "none", "once", "in part", "more than once"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One crash. ``effect`` is by the user's own measure, taken after the process was gone."""

    place: Place
    effect: str  # none, once, in part, more than once
    answer: bool | None = None
    """What the check said."""
    error: str = ""
    """What the check raised; then it could not tell."""
    lie: str = ""
    """Why the answer is wrong, and what it would lead to; empty: it is true, or none was given."""

    @property
    def unsure(self) -> bool:
        return self.answer is None and not self.lie

    @property
    def where(self) -> str:
        """The line, or what stands for it."""
        place = self.place
        match place.kind:
            case "never":
                return "it was never started"
            case "start":
                return "before the first line"
            case "end":
                return "after the handler returned"
            case "call":
                return f"{Path(place.file).name}:{place.line}, after {place.call}()"
            case _:
                return f"{Path(place.file).name}:{place.line}"


class CrashReport(msgspec.Struct, frozen=True, kw_only=True):
    """``str(report)`` is the table that a failed test shows."""

    handler: str
    check: str
    findings: tuple[Finding, ...]
    walked: int
    """How many places a run of the handler has; more than findings, if they were too many."""

    @property
    def lies(self) -> tuple[Finding, ...]:
        return tuple(each for each in self.findings if each.lie)

    @property
    def unsure(self) -> tuple[Finding, ...]:
        return tuple(each for each in self.findings if each.unsure)

    def __str__(self) -> str:
        killed = len(self.findings) - 1  # the first one was never started
        some = "" if killed >= self.walked else f" of {self.walked}"
        parts = [f"{self.handler} was killed at {killed}{some} places. {self.check} {self._verdict()}"]
        rows = [("the process died", "effect", "answer", "next line of the handler")]
        rows += [(each.where, each.effect, _answer(each), _source(each)) for each in self.findings]
        widths = [max(len(row[at]) for row in rows) for at in range(3)]
        for at, row in enumerate(rows):
            cells = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
            parts.append(f"  {cells}  {row[3]}".rstrip())
            if at and (wrong := self.findings[at - 1].lie or self.findings[at - 1].error):
                parts.append(f"    ^ {'A LIE: ' if self.findings[at - 1].lie else ''}{wrong}")
        return "\n".join(parts)

    def _verdict(self) -> str:
        said = "told the truth"
        if self.lies:
            said = f"lied at {len(self.lies)} of them: {_places(self.lies)}"
        if self.unsure:
            said += f"; it could not tell at {len(self.unsure)}, where a human would be asked"
        return said


def _places(lies: Sequence[Finding]) -> str:
    named = list(dict.fromkeys(each.where for each in lies))
    return ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")


def _answer(finding: Finding) -> str:
    return "raised" if finding.error else str(finding.answer)


def _source(finding: Finding) -> str:
    text = finding.place.source if finding.place.kind in ("line", "call") else ""
    return text if len(text) <= SOURCE_CHARS else text[: SOURCE_CHARS - 1] + "…"


def lie_about(effect: str, answer: bool | None) -> str:
    """Whether ``answer`` contradicts the effect that stands, and what the cluster would do with it."""
    # "in part" and False: whether another run mends it or doubles the part, only that run can tell.
    match effect, answer:
        case (_, None):
            return ""
        case ("none", True):
            return "no effect stands, and it would never run again: the task is lost"
        case ("once", False):
            return "the effect stands, and it would run again: it takes effect twice"
        case ("in part", True):
            return "a part of the effect stands, and it would never run again: the rest is lost"
        case ("more than once", _):
            return "the effect stands more than once after a single run"
        case _:
            return ""
