"""RELIABILITY 9 to 12 and 14 to 21: nodes killed and paused, at any time and at each step of a task's way."""

from __future__ import annotations

from collections.abc import Callable

from chaos import history as h
from chaos.history import History
from chaos.scenarios.nodes import eventually
from chaos.scenarios.run import Scenario
from chaos.scenarios.stage import Stage
from dedup.ids import id_text

LAPSE_S = 4.0  # twice the session's timeout


def leader_killed(stage: Stage) -> None:
    nodes = stage.nodes
    stage.resume_bound_ms = 2_000
    with stage.during(nodes.killed(nodes.leader())):
        stage.flow()


def follower_killed(stage: Stage) -> None:
    nodes = stage.nodes
    stage.no_submit_fails()
    with stage.during(nodes.killed(stage.random.choice(nodes.followers()))):
        stage.flow()
        stage.hold(LAPSE_S)
        stage.flow()
    nodes.wait_up()


def majority_killed(stage: Stage) -> None:
    nodes = stage.nodes
    lost = stage.random.sample(nodes.names, 2)
    with stage.during(nodes.killed(*lost)):
        stage.hold(LAPSE_S)
    nodes.wait_up()


def all_killed(stage: Stage) -> None:
    nodes = stage.nodes
    for _ in range(2):
        with stage.during(nodes.killed(*nodes.names)):
            stage.hold(0.5)
        nodes.wait_up()
        stage.flow()


def follower_paused(stage: Stage) -> None:
    _paused(stage, stage.random.choice(stage.nodes.followers()))


def leader_paused(stage: Stage) -> None:
    _paused(stage, stage.nodes.leader())


def _paused(stage: Stage, node: str) -> None:
    nodes = stage.nodes
    others = tuple(each for each in nodes.names if each != node)
    with stage.during(nodes.paused(node)):
        nodes.leader(others)
        stage.flow()
        stage.hold(LAPSE_S)
    nodes.wait_up()


def _at_step(step: str) -> Callable[[Stage], None]:
    def play(stage: Stage) -> None:
        nodes = stage.nodes
        node = stage.random.choice(nodes.names)
        nodes.stop(node)
        nodes.start(node, settings={"crash_at": f"{step}:{stage.random.randrange(1, 6)}"})
        fault = nodes.killed(node)
        nodes.died(node)
        with stage.during(fault):
            stage.notes.append(f"{node} killed itself {step.replace('_', ' ')}")
            stage.flow()
        nodes.wait_up()

    return play


def after_settle(stage: Stage) -> None:
    for step in ("after_settle", "before_commit", "after_commit"):
        _at_step(step)(stage)


def _in_effect(place: str) -> Callable[[Stage], None]:
    def play(stage: Stage) -> None:
        nodes = stage.nodes
        for handler in ("write", "reckon", "drift"):
            task_id = stage.trap(handler, place, "kill_node")
            stage.taken(task_id)
            with stage.during(nodes.killed(nodes.died())):
                stage.hold(0.3)
            nodes.wait_up()
            stage.afterwards.append(_was_suspect(task_id))
            stage.notes.append(f"{handler}: the node of task {id_text(task_id)} died {place} its effect")

    return play


def _was_suspect(task_id: int | bytes) -> Callable[[History], list[str]]:
    def look(history: History) -> list[str]:
        seen = any(isinstance(each, h.Suspected) and each.id == task_id for each in history.decisions)
        return (
            [] if seen else [f"{id_text(task_id)}: its node died in mid-flight, and it was never a suspect"]
        )

    return look


def killed_in_testimony(stage: Stage) -> None:
    """The node dies in the effect, and again as soon as it has a session to testify in."""
    nodes = stage.nodes
    task_id = stage.trap("write", "after", "kill_node")
    stage.taken(task_id)
    node = nodes.died()
    for _ in range(3):
        nodes.start(node)

        def joined(node: str = node) -> bool:
            answer = nodes.ask(node, "/v1/status?local=1")
            return bool(answer and answer["session"])

        eventually(f"{node} has a session", joined, pause_s=0.005)
        with stage.during(nodes.killed(node)):
            stage.hold(0.1)
        nodes.kill(node)
    nodes.start(node)
    nodes.wait_up()

    def one_ruling(history: History) -> list[str]:
        rulings = [each for each in history.decisions if isinstance(each, h.Ruled) and each.id == task_id]
        return [] if len(rulings) == 1 else [f"{id_text(task_id)}: {len(rulings)} rulings: {rulings}"]

    stage.afterwards.append(one_ruling)


DEATHS = (
    Scenario(
        9,
        "leader-killed",
        "SIGKILL of the leader",
        "claims resume within 2 s",
        leader_killed,
        smoke=True,
    ),
    Scenario(
        10, "follower-killed", "SIGKILL of a follower, which rejoins", "clients see no error", follower_killed
    ),
    Scenario(
        11,
        "majority-killed",
        "SIGKILL of two nodes of three",
        "nothing acknowledged is lost",
        majority_killed,
    ),
    Scenario(
        12,
        "all-killed",
        "SIGKILL of every node at once, twice",
        "nothing acknowledged is lost",
        all_killed,
        smoke=True,
    ),
    Scenario(
        14,
        "follower-paused",
        "SIGSTOP of a follower for longer than its lease",
        "the zombie is rejected",
        follower_paused,
        smoke=True,
    ),
    Scenario(15, "leader-paused", "SIGSTOP of the leader", "no double claim", leader_paused),
    Scenario(16, "killed-before-claim", "a node dies before a claim", "nothing", _at_step("before_claim")),
    Scenario(
        17,
        "killed-after-claim",
        "a node dies after a claim, before the start",
        "never started: it runs again",
        _at_step("after_claim"),
    ),
    Scenario(
        18,
        "killed-in-effect",
        "a node dies before the effect of a task that runs",
        "suspect",
        _in_effect("before"),
    ),
    Scenario(
        19,
        "killed-after-effect",
        "a node dies after the effect, before the settle",
        "suspect; testimony or check finds it",
        _in_effect("after"),
        smoke=True,
    ),
    Scenario(
        20,
        "killed-after-settle",
        "a node dies after a settle, before and after the commit",
        "the redelivery is discarded",
        after_settle,
    ),
    Scenario(
        21,
        "killed-in-testimony",
        "a node dies each time that it comes back to testify",
        "one ruling",
        killed_in_testimony,
    ),
)
