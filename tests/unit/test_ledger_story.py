"""One golden scenario: two nodes, a crash, every kind of evidence, told line by line as the ledger answers."""

from __future__ import annotations

from dedup.ids import Ids, id_text
from raft import commands as words  # pytest would take Testify, imported by name, for a test
from raft.commands import (
    Advance,
    AllocateIds,
    Answered,
    Cancel,
    Claim,
    Command,
    Join,
    Result,
    Rule,
    Settle,
    Verdict,
)
from raft.ledger import Ledger

RUN = Ids(((1, 8),))


def ids(first: int, count: int = 1) -> Ids:
    return Ids(((first, count),))


SCRIPT: list[tuple[Command, ...]] = [
    (Join("n1", 1, 2000), Join("n2", 1, 9000), AllocateIds(9)),
    (Claim(1, RUN), Claim(2, ids(8, 2))),
    (Settle(1, (words.Settlement(2, ids(1), Result.DONE), words.Settlement(2, ids(2), Result.RETRY, 1500))),),
    (Advance("n2", 1000), Cancel(ids(2, 2), "ann")),
    (Advance("n2", 1000),),
    (Settle(1, (words.Settlement(2, ids(3), Result.DONE),)), Claim(2, RUN)),
    (Join("n1", 2, 2000),),
    (
        words.Testify(
            "n1",
            2,
            (
                words.Testimony(2, ids(4), words.Fact.NEVER_STARTED),
                words.Testimony(2, ids(5), words.Fact.FINISHED),
                words.Testimony(2, ids(6, 3), words.Fact.STARTED),
            ),
        ),
    ),
    (
        Rule(ids(6), Verdict.EXECUTED, "check", "in the bank", 2),
        Rule(ids(7), Verdict.NOT_EXECUTED, "check", "", 2),
    ),
    (Rule(ids(8), Verdict.HELD, "policy:hold", "ask"), Claim(2, RUN)),
    (Rule(ids(8), Verdict.NOT_EXECUTED, "human:bob", "no mail"), Claim(2, ids(8))),
    (Claim(2, ids(8)), Settle(2, (words.Settlement(12, ids(8), Result.DEAD),))),
]

STORY = """
1: Joined(1, 0) Joined(2, 0) Allocated(1, 9)
   SessionOpened(1, 'n1', 1)
   SessionOpened(2, 'n2', 1)
2: 8xGRANTED(2, 1) | 1xHELD(0, 1) 1xGRANTED(2, 1)
3: 2xSETTLED
   Freed(2)
4: Advanced(1000) | 1xSETTLED 1xBUSY
   Deleted(2, 'ann')
5: Advanced(2000)
   SessionClosed(1, 'n1', 1, 'lapsed')
   Suspected(3..8, 2, 'n1', 1, 'lapsed')
6: 1xLAPSED | 1xEXECUTED 1xCANCELLED 1xEXECUTED 5xSUSPECT(2, 0)
   Testified(3, 2, 'n1', FINISHED)
   Resolved(3, 2, EXECUTED, 'testimony', 'n1: finished')
7: Joined(7, 2000)
   SessionOpened(7, 'n1', 2)
8: 5xSETTLED
   Testified(4, 2, 'n1', NEVER_STARTED)
   Resolved(4, 2, NOT_EXECUTED, 'testimony', 'n1: never started')
   Freed(4)
   Testified(5, 2, 'n1', FINISHED)
   Resolved(5, 2, EXECUTED, 'testimony', 'n1: finished')
   Testified(6..8, 2, 'n1', STARTED)
9: 1xSETTLED | 1xSETTLED
   Resolved(6, 2, EXECUTED, 'check', 'in the bank')
   Resolved(7, 2, NOT_EXECUTED, 'check', '')
   Freed(7)
10: 1xSETTLED | 1xEXECUTED 1xCANCELLED 1xEXECUTED 1xGRANTED(10, 1) 2xEXECUTED 1xGRANTED(10, 2) 1xSUSPECT(2, 0)
   Resolved(8, 2, HELD, 'policy:hold', 'ask')
11: 1xSETTLED | 1xGRANTED(11, 2)
   Resolved(8, 2, NOT_EXECUTED, 'human:bob', 'no mail')
   Freed(8)
12: 1xGRANTED(11, 2) | 1xFENCED
"""


def shown(value: object) -> str:
    if isinstance(value, Ids):
        runs = [f"{start}..{start + count - 1}" if count > 1 else f"{start}" for start, count in value.runs]
        return "+".join(runs + [id_text(key) for key in value.keys])
    return getattr(value, "name", None) or repr(value)


def line(struct: object) -> str:
    fields = [shown(getattr(struct, name)) for name in struct.__struct_fields__]  # type: ignore[attr-defined]
    return f"{type(struct).__name__}({', '.join(fields)})"


def spans(answer: Answered) -> str:
    told = []
    for span in answer.spans:
        more = f"({span.fence}, {span.detail})" if span.fence or span.detail else ""
        told.append(f"{span.count}x{span.outcome.name}{more}")
    return " ".join(told)


def test_the_story_of_two_nodes_a_crash_and_all_evidence() -> None:
    ledger = Ledger(1)
    told = [""]
    for index, commands in enumerate(SCRIPT, start=1):
        effects = ledger.apply_proposal(index, words.Proposal(1, index, commands))
        ledger.check_invariants()
        text = ""
        for answer in effects.answers:
            whole = isinstance(answer, Answered)
            text += (" | " if text and whole else " ") + (spans(answer) if whole else line(answer))
        told.append(f"{index}:" + text)
        told += ["   " + line(event) for event in effects.events]
    assert "\n".join(told) + "\n" == STORY
