"""Bugs of schedules and of reschedules, planted as in planted.py."""

from __future__ import annotations

import node.coordinator
import node.rescheduling
import node.schedules
import oncekeeper.log.memory_delayed
import raft.ledger_schedules
from chaos.simulation.plants import Plant, edit, rule, several

_driver = node.schedules.ScheduleDriver
_schedules = raft.ledger_schedules

SCHEDULES = (
    Plant(
        "forgotten-before-appended",
        "the ledger forgets a firing before its task is in the log",
        edit(
            _driver,
            "_launch",
            "await self._append([firing_task(firing, now_ms) for firing in firings])",
            "launched = await self._propose(tuple(Launched(each.name, each.at_ms) for each in firings))\n"
            "        await self._append([firing_task(firing, now_ms) for firing in firings])",
        ),
    ),
    Plant(
        "id-of-the-moment",
        "the id of a firing's task holds when it was appended, and not when it is due",
        edit(
            node.schedules,
            "firing_task",
            "firing_id(firing.name, firing.at_ms)",
            "firing_id(firing.name, now_ms)",
        ),
    ),
    Plant(
        "id-without-name",
        "the id of a firing's task holds its time and not its schedule",
        edit(
            node.schedules,
            "firing_task",
            "firing_id(firing.name, firing.at_ms)",
            "firing_id('', firing.at_ms)",
        ),
    ),
    Plant(
        "fires-early",
        "a schedule fires what is due within 300 ms",
        edit(
            _driver,
            "_due",
            "computed, now_ms = 0, self._wall_ms()",
            "computed, now_ms = 0, self._wall_ms() + 300",
        ),
    ),
    Plant(
        "paused-fires",
        "a firing that was on its way when its schedule was paused is decided all the same",
        rule("fire", "Fire", "known.paused or ", "", _schedules),
    ),
    Plant(
        "old-timetable-fires",
        "a firing is decided by what the schedule said when it was read",
        rule("fire", "Fire", " or known.revision != command.revision", "", _schedules),
    ),
    Plant(
        "fires-again",
        "a firing that was decided is decided once more",
        rule(
            "fire",
            "Fire",
            "at_ms <= max(known.fired_ms, known.since_ms)",
            "at_ms <= known.since_ms",
            _schedules,
        ),
    ),
    Plant(
        "changed-fires-again",
        "a schedule that is changed forgets for what it has fired",
        rule(
            "put_schedule",
            "PutSchedule",
            "known, timetable=timetable,",
            "known, fired_ms=0, timetable=timetable,",
            _schedules,
        ),
    ),
    Plant(
        "resume-owes-the-pause",
        "what was due while a schedule was paused fires when it is resumed",
        rule(
            "pause_schedule",
            "PauseSchedule",
            "known.since_ms if command.paused else max(known.since_ms, command.now_ms)",
            "known.since_ms",
            _schedules,
        ),
    ),
    Plant(
        "catch-up-always",
        "what was missed is made up for, whatever catch_up says",
        edit(
            node.schedules,
            "due",
            "match schedule.timetable.catch_up:",
            "match 'all':",
        ),
    ),
    Plant(
        "late-is-missed",
        "whatever came due while nobody led is missed, however short that was",
        edit(node.schedules, "due", "now_ms - overdue[0] <= late_ms", "len(overdue) == 1"),
    ),
)

RESCHEDULES = (
    Plant(
        "nobody-is-told",
        "a reschedule is acknowledged without a word to those who may have fetched the task",
        edit(
            node.rescheduling.Rescheduling,
            "_untold",
            "told: set[str] = set()",
            "return frozenset()",
        ),
    ),
    Plant(
        "acknowledged-and-not-moved",
        "a reschedule is acknowledged, and the row stays where it was",
        edit(node.rescheduling, "_keep", "delays.move(others, due_ms) > 0", "True"),
    ),
    Plant(
        "short-not-looked-up",
        "what waited in memory starts by the time in its message, though it was moved in the store",
        edit(
            node.coordinator.Coordinator,
            "_route",
            "elif piece.row is None and piece.is_delayed and self._delays is not None:",
            "elif False:",
        ),
    ),
    Plant(
        "moved-in-the-lane",
        "what waits for a worker is not looked up again when it was moved",
        edit(
            node.coordinator.Coordinator,
            "_delays_changed",
            "for piece in lane.drop_due(partitions):",
            "for piece in ():",
        ),
    ),
    Plant(
        "message-has-the-last-word",
        "what takes its turn waits for the time in its message, from which it was moved",
        several(
            edit(
                node.coordinator,  # which has it by name
                "due_by_message",
                "piece.row is None and is_delayed(piece.batch)",
                "piece.row is None",
            ),
            edit(
                oncekeeper.log.memory_delayed,
                "enqueued",
                "due_ms=due_ms or batch.due_ms",
                "due_ms=batch.due_ms",
            ),
        ),
    ),
)
