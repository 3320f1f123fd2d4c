"""Spans of time as people write them: ``200ms``, ``10s``, ``1h30m``, a number of seconds, or a ``timedelta``."""

from __future__ import annotations

import re
from datetime import timedelta

_UNIT_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_PART = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)(ms|s|m|h|d)")
_RULE = "must be a duration such as 200ms, 10s, 5m, 1h30m or 2d"


def duration_ms(given: str | float | timedelta) -> int:
    """Whole milliseconds, rounded; ValueError says the rule. Plain numbers are seconds."""
    if isinstance(given, timedelta):
        return given // timedelta(milliseconds=1)
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        if not abs(given) < 1e12:
            raise ValueError(f"{_RULE}, not {given!r}")
        return round(given * 1000)
    if not isinstance(given, str):
        raise ValueError(f"{_RULE}, not {given!r}")
    text = given.strip()
    parts = _PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"{_RULE}, not {given[:40]!r}")
    return round(sum(float(number) * _UNIT_MS[unit] for number, unit in parts))


def duration_text(milliseconds: int) -> str:
    """The shortest text in one unit that ``duration_ms`` reads as the same: ``90m``, not ``1h30m``."""
    for unit in ("d", "h", "m", "s"):
        if milliseconds % _UNIT_MS[unit] == 0 and milliseconds:
            return f"{milliseconds // _UNIT_MS[unit]}{unit}"
    return f"{milliseconds}ms"
