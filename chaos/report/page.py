"""report.html: a run on one page that needs nothing else, neither network nor script."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

from chaos.report.plots import latency, throughput
from chaos.report.style import STYLE
from chaos.report.timeline import Doubt, Window, doubts, timeline, window
from dedup.ids import id_text

if TYPE_CHECKING:
    from chaos.scenarios.run import Run
    from chaos.scenarios.stage import Bound

SENTENCES_MAX = 20
DOUBTS_MAX = 40


def page(run: Run) -> str:
    shown = window(run.history)
    title = f"{run.scenario.name}: {run.verdict}"
    body = "\n".join(
        [
            _head(run),
            _figures(run),
            _timeline(run, shown),
            _plots(run, shown),
            _invariants(run),
            _doubts(run, shown),
            _rest(run),
        ]
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>{body}</main></body></html>\n"
    )


def _head(run: Run) -> str:
    scenario = run.scenario
    kind = {"holds": "good", "skipped": "dim"}.get(run.verdict, "bad")
    return (
        f'<header><h1>{escape(scenario.name)}</h1><span class="badge {kind}">{escape(run.verdict)}</span></header>'
        f"<p class=lead>Strikes: {escape(scenario.strikes)}. Must hold: {escape(scenario.holds)}, "
        f"and every invariant.</p>"
    )


def _figures(run: Run) -> str:
    history = run.history
    suspects = doubts(history)
    figures = [
        ("tasks submitted", f"{len(history.submitted):,}"),
        ("effects", f"{len(history.effects):,}"),
        ("in doubt", f"{len(suspects):,}"),
        ("effects of zombies", f"{run.document()['zombie_effects']:,}"),
        ("invariants that hold", f"{sum(not each.wrong for each in run.found)} of {len(run.found)}"),
        ("seconds, all in all", f"{run.wall_s:.1f}"),
    ]
    cells = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in figures)
    return f"<section class=figures>{cells}</section>"


def _legend(*entries: tuple[str, str]) -> str:
    keys = "".join(f'<span><i class="key {kind}"></i>{escape(words)}</span>' for kind, words in entries)
    return f"<p class=legend>{keys}</p>"


def _timeline(run: Run, shown: Window) -> str:
    legend = _legend(
        ("fault", "fault stands"),
        ("leads", "leads"),
        ("claim", "claims granted"),
        ("effect", "effects"),
        ("suspect", "became a suspect"),
        ("resolved", "was resolved"),
    )
    return f"<section><h2>Nodes and links</h2>{legend}{timeline(run.history, shown)}</section>"


def _plots(run: Run, shown: Window) -> str:
    rates = _legend(("submits", "submitted"), ("effects", "took effect"), ("fault", "fault stands"))
    times = _legend(("median", "median"), ("slowest", "slowest"), ("fault", "fault stands"))
    return (
        f"<section><h2>Tasks a second</h2>{rates}{throughput(run.history, shown)}</section>"
        f"<section><h2>From submit to effect</h2>{times}{latency(run.history, shown)}</section>"
    )


def _sentences(sentences: Iterable[str]) -> str:
    every = list(sentences)
    more = len(every) - SENTENCES_MAX
    items = "".join(f"<li>{escape(each)}</li>" for each in every[:SENTENCES_MAX])
    return f"<ul>{items}{f'<li>and {more} more</li>' if more > 0 else ''}</ul>" if every else ""


def _invariants(run: Run) -> str:
    rows = "".join(
        f"<tr><td class=num>{each.invariant.number}</td><td>{escape(each.invariant.claim)}{_sentences(each.wrong)}"
        f'</td><td><span class="badge {"bad" if each.wrong else "good"}">'
        f"{'violated' if each.wrong else 'holds'}</span></td></tr>"
        for each in run.found
    )
    if not rows:
        return "<section><h2>Invariants</h2><p class=dim>The run did not get so far as to be judged.</p></section>"
    return f"<section><h2>Invariants</h2><table>{rows}</table></section>"


def _doubts(run: Run, shown: Window) -> str:
    found = doubts(run.history)
    if not found:
        return "<section><h2>Doubt</h2><p class=dim>No task was in doubt.</p></section>"
    kinds = Counter((each.why, ", ".join(each.facts) or "nobody", each.verdict, each.by) for each in found)
    summary = "".join(
        f"<li>{count:,}: claim {escape(why)}; testified by its holder: {escape(facts)}; "
        f"{escape(f'{verdict}, by {by}' if verdict else 'open')}</li>"
        for (why, facts, verdict, by), count in kinds.most_common()
    )
    rows = "".join(_doubt_row(each, shown) for each in found[:DOUBTS_MAX])
    head = (
        "<tr><th>task</th><th>held by</th><th>lost at</th><th>because</th><th>testimony</th><th>ruling</th>"
        "<th>after</th></tr>"
    )
    more = f"<p class=dim>and {len(found) - DOUBTS_MAX:,} more</p>" if len(found) > DOUBTS_MAX else ""
    return f"<section><h2>Doubt</h2><ul>{summary}</ul><table>{head}{rows}</table>{more}</section>"


def _doubt_row(doubt: Doubt, shown: Window) -> str:
    lost = f"{shown.s(doubt.suspected_ns):.2f} s" if doubt.suspected_ns else "?"
    took = f"{(doubt.resolved_ns - doubt.suspected_ns) / 1e6:,.0f} ms" if doubt.resolved_ns else "-"
    cells = (
        f"{id_text(doubt.id)} <span class=dim>/ {doubt.fence}</span>",
        escape(doubt.node),
        lost,
        escape(doubt.why),
        escape(", ".join(doubt.facts) or "-"),
        escape(f"{doubt.verdict}, by {doubt.by}" if doubt.verdict else "open"),
        took,
    )
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _rest(run: Run) -> str:
    parts = []
    if run.wrong:
        parts.append(f"<section><h2>What else is wrong</h2>{_sentences(run.wrong)}</section>")
    if run.bounds:
        rows = "".join(_bound_row(each) for each in run.bounds)
        head = "<tr><th>bound</th><th class=num>took</th><th class=num>allowed</th><th></th></tr>"
        parts.append(f"<section><h2>Bounds in time</h2><table>{head}{rows}</table></section>")
    if run.notes:
        parts.append(f"<section><h2>Notes</h2>{_sentences(run.notes)}</section>")
    parts.append(
        f"<footer>seed {run.seed} · scenario {run.scenario.number} of the list · "
        "the whole history stands in history.jsonl beside this page</footer>"
    )
    return "".join(parts)


def _bound_row(bound: Bound) -> str:
    took = "never" if bound.took_ms is None else f"{bound.took_ms:,.0f} ms"
    kind, word = ("good", "met") if bound.met else ("warn", "missed")
    return (
        f"<tr><td>{escape(bound.what)}</td><td class=num>{took}</td><td class=num>{bound.bound_ms:,.0f} ms</td>"
        f'<td><span class="badge {kind}">{word}</span></td></tr>'
    )
