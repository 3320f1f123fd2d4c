"""The ledger against a naive one, and the proof that this comparison sees bugs."""

from __future__ import annotations

import inspect
from types import FunctionType, ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup import suspects as suspect_values
from raft import (
    ledger_claims,
    ledger_registry,
    ledger_schedules,
    ledger_sessions,
    ledger_snapshot,
    ledger_state,
    ledger_suspects,
    ledger_tokens,
)
from raft.ledger import LedgerCorrupt
from tests.support.ledger_model import KINDS, random_steps, run

small = st.integers(0, 119)
steps = st.lists(st.tuples(st.integers(0, KINDS - 1), small, small, small, small), max_size=50)


@settings(max_examples=1500, deadline=None)
@given(steps)
def test_the_ledger_says_and_does_what_a_naive_ledger_does(
    drawn: list[tuple[int, int, int, int, int]],
) -> None:
    run(drawn)


@settings(max_examples=150, deadline=None)
@given(steps)
def test_a_replica_restored_at_any_point_agrees_with_one_that_never_was(
    drawn: list[tuple[int, int, int, int, int]],
) -> None:
    run(drawn, twin=True)


@pytest.mark.parametrize("seed", range(12))
def test_long_random_histories_agree(seed: int) -> None:
    run(random_steps(seed, 250), twin=seed % 3 == 0)


# ruff: noqa: E501 - a row of the table of planted bugs is one line

PLANTED = [
    # (what is wrong, module, correct text, planted text)
    ("a settle with an old fence is taken", ledger_claims, "elif value.fence != settlement.fence:", "elif False:"),
    ("any session may settle", ledger_claims, "if value.session != session:", "if False:"),
    ("a live holder is robbed", ledger_claims, "if value.session != command.session:", "if False:"),
    ("a retry runs early", ledger_claims, "if value.due_ms > state.now_ms:", "if False:"),
    ("one entry grants twice", ledger_claims, "if value.fence >= state.index:", "if False:"),
    ("a lapsed session claims", ledger_claims, "if command.session not in state.sessions:", "if False:"),
    ("a retry does not count", ledger_claims, "claim.attempt + 1, now + settlement", "claim.attempt, now + settlement"),
    ("a stale attempt is granted", ledger_claims, "elif command.attempt > 1:", "elif False:"),
    ("a repeated id is counted twice", ledger_claims, "single_parts(ids) if repeats(ids) else (ids,)", "(ids,)"),
    ("doubt leaves no testimony", ledger_claims, "testified=(session.incarnation,)", "testified=()"),
    ("a lost session settles another's suspect", ledger_claims, "if suspect.session != session:", "if False:"),
    ("any node testifies", ledger_suspects, "value.node != command.node", "False"),
    ("an earlier incarnation testifies", ledger_suspects, "command.incarnation < value.incarnation", "False"),
    ("a second testimony overturns the first", ledger_suspects, "if incarnation in suspect.testified:", "if False:"),
    ("a ruling hits any fence", ledger_suspects, "command.fence not in (0, value.fence)", "False"),
    ("a ruling to rerun keeps the attempt", ledger_suspects, "suspect.attempt + 1, now", "suspect.attempt, now"),
    ("never started counts as an attempt", ledger_suspects, "(word.fact is Fact.FAILED)", "1"),
    ("a lapse loses the claims", ledger_suspects, "state.move(ids, len(ids), claim, suspect)", "pass"),
    ("an older incarnation joins", ledger_sessions, "command.incarnation < seen.incarnation", "False"),
    ("a new incarnation leaves the old session", ledger_sessions, "incarnation < command.incarnation", "session < 0"),
    ("a new timekeeper counts twice", ledger_sessions, "if takes_over:", "if False:"),
    ("a step of time is not capped", ledger_sessions, "min(command.elapsed_ms, state", "max(command.elapsed_ms, state"),
    ("sessions never lapse", ledger_sessions, "if session.expires_ms <= state.now_ms:", "if False:"),
    ("a heartbeat does not renew", ledger_sessions, "state.now_ms + session.timeout_ms", "session.expires_ms"),
    ("a cancel forgets the fence", ledger_registry, "Cancelled(value.fence,", "Cancelled(0,"),
    ("a dead id is cancelled", ledger_registry, "elif isinstance(value, Waiting):", "elif isinstance(value, Waiting | Dead):"),
    ("a suspect is revived", ledger_registry, "isinstance(value, Dead | Cancelled)", "isinstance(value, Dead | Cancelled | Suspect)"),
    ("ids are allocated twice", ledger_registry, "start + command.count\n", "start + command.count - 1\n"),
    ("a time fires twice", ledger_schedules, "at_ms <= max(known.fired_ms, known.since_ms)", "at_ms <= known.since_ms"),
    ("what was due in a pause fires", ledger_schedules, "at_ms <= max(known.fired_ms, known.since_ms)", "at_ms <= known.fired_ms"),
    ("a paused schedule fires", ledger_schedules, "known.paused or known.revision", "known.revision"),
    ("an earlier revision fires", ledger_schedules, "known.revision != command.revision", "False"),
    ("what passes is laid down", ledger_schedules, "if command.runs:", "if True:"),
    ("a launched firing is kept", ledger_schedules, "state.firings.pop((command.name, command.at_ms), None)", "pass"),
    ("anybody changes a schedule", ledger_schedules, "if known.owner != owner:", "if False:"),
    ("a new time fires for the past", ledger_schedules, "since_ms = max(since_ms, now_ms)", "pass"),
    ("a snapshot forgets firings", ledger_snapshot, "for firing in body.firings}", "for firing in ()}"),
    ("executed ids are forgotten", ledger_state, "added = self.executed.add(ids, self.now_ms)", "added = count"),
    ("unallocated ids are granted", ledger_state, "start + length <= self.next_id", "True"),
    ("held suspects are miscounted", ledger_state, "if new.held_by:", "if True:"),
    ("a repeated token is applied again", ledger_tokens, "answers = known.window.get(sequence)", "answers = None"),
    ("a repeated token drops the first answers", ledger_tokens, "return answers", "return None"),
    ("a snapshot forgets who keeps the time", ledger_snapshot, "state.timekeeper = body.timekeeper", "pass"),
    ("a snapshot forgets incarnations", ledger_snapshot, "state.nodes = dict(body.nodes)", "pass"),
    ("a snapshot forgets the last session", ledger_snapshot, "state.last_session = body.last_session", "pass"),
    ("a snapshot forgets tokens", ledger_snapshot, "state.tokens.load(body.proposers)", "pass"),
    ("a snapshot forgets the executed set", ledger_snapshot, "state.executed = executed", "pass"),
    ("a snapshot forgets keyed states", ledger_snapshot, "keys[number] += some", "pass"),
    ("a snapshot's indexes are not rebuilt", ledger_snapshot, "state.enter(ids, len(ids), value)", "pass"),
    ("a testimony is not written down", suspect_values, "testified=(*self.testified, incarnation)", "testified=self.testified"),
]  # fmt: skip


@pytest.mark.parametrize(("bug", "module", "right", "wrong"), PLANTED, ids=[row[0] for row in PLANTED])
def test_a_planted_bug_is_seen(
    bug: str, module: ModuleType, right: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(module, right, wrong, monkeypatch)
    for seed in range(400):
        try:
            run(random_steps(seed), twin=module is ledger_snapshot)
        except (AssertionError, LedgerCorrupt, KeyError, ValueError):
            return
    pytest.fail(f"400 random histories did not show that {bug}")


def plant(module: ModuleType, right: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the functions of a module the code that its changed source compiles to."""
    source = inspect.getsource(module)
    assert right in source, f"{module.__name__} has no text {right!r} to plant a bug into"
    namespace = dict(vars(module))
    exec(compile(source.replace(right, wrong), f"planted {module.__name__}", "exec"), namespace)
    for name, original in functions(vars(module), module.__name__):
        changed = dict(functions(namespace, module.__name__))[name]
        monkeypatch.setattr(original, "__code__", changed.__code__)


def functions(namespace: dict[str, object], module: str) -> list[tuple[str, FunctionType]]:
    found: list[tuple[str, FunctionType]] = []
    for name, each in namespace.items():
        if isinstance(each, FunctionType) and each.__module__ == module:
            found.append((name, each))
        elif isinstance(each, type) and each.__module__ == module:
            found += [
                (f"{name}.{at}", method)
                for at, method in vars(each).items()
                if isinstance(method, FunctionType)
            ]
    return found
