"""RELIABILITY 1 to 8 and 40: the links."""

from __future__ import annotations

import time

from chaos.faults import now_ns
from chaos.scenarios.run import Scenario
from chaos.scenarios.stage import Stage

CUT_S = 4.0  # twice the session's timeout: what is lost lapses while the fault stands
TERMS_MAX = 10


def _others(stage: Stage, node: str) -> tuple[str, ...]:
    return tuple(each for each in stage.nodes.names if each != node)


def leader_isolated(stage: Stage) -> None:
    nodes = stage.nodes
    old = nodes.leader()
    others = _others(stage, old)
    stage.resume_bound_ms = 2_000
    with stage.during(nodes.links.cut("leader isolated", [(old, each) for each in others])) as struck:
        new = nodes.leader(others)
        stage.notes.append(f"{old} was cut off, {new} leads")
        stage.flow()
        stage.hold(CUT_S / 2)
        until = now_ns()
    # What was on its way when the cable was cut may still have been heard.
    stage.confirms_nothing(old, struck + 50_000_000, until)


def follower_isolated(stage: Stage) -> None:
    nodes = stage.nodes
    leader = nodes.leader()
    follower = stage.random.choice(nodes.followers())
    term = nodes.roles()[leader][1]
    stage.no_submit_fails()
    with stage.during(
        nodes.links.cut("follower isolated", [(follower, n) for n in _others(stage, follower)])
    ):
        stage.flow()
        stage.hold(CUT_S)
        seen = nodes.roles().get(leader)
        stage.expect(seen == ("leader", term), f"{leader} led term {term} before, and now it is {seen}")


def all_apart(stage: Stage) -> None:
    nodes = stage.nodes
    pairs = list(nodes.links.proxies)
    with stage.during(nodes.links.cut("all apart", pairs)) as struck:
        stage.hold(CUT_S)
        until = now_ns()
    for node in nodes.names:
        stage.confirms_nothing(node, struck + 50_000_000, until)


def bridge(stage: Stage) -> None:
    nodes = stage.nodes
    middle = stage.random.choice(nodes.names)
    term = max(t for _, t in nodes.roles().values())
    with stage.during(nodes.links.cut("bridge", [_others(stage, middle)])):  # type: ignore[list-item]
        stage.flow()
        stage.hold(CUT_S)
        stage.flow()
        now = max(t for _, t in nodes.roles().values())
        stage.expect(now - term <= TERMS_MAX, f"terms grew from {term} to {now} in {CUT_S:g} s")
        stage.notes.append(f"only {middle} was seen by both others; terms {term} to {now}")


def follower_deaf(stage: Stage) -> None:
    nodes = stage.nodes
    deaf = stage.random.choice(nodes.followers())
    directions = [(each, deaf) for each in _others(stage, deaf)]
    term = max(t for _, t in nodes.roles().values())
    with stage.during(nodes.links.one_way("follower deaf", directions)):
        stage.flow()
        stage.hold(CUT_S)
        stage.flow()
        now = max(t for _, t in nodes.roles().values())
        stage.expect(now - term <= TERMS_MAX, f"terms grew from {term} to {now} in {CUT_S:g} s")


def leader_mute(stage: Stage) -> None:
    nodes = stage.nodes
    mute = nodes.leader()
    directions = [(mute, each) for each in _others(stage, mute)]
    with stage.during(nodes.links.one_way("leader mute", directions)):
        began = time.monotonic()
        stage.within(
            "the mute leader steps down",
            2.0,
            lambda: nodes.roles().get(mute, ("leader", 0))[0] != "leader",
            began,
        )
        nodes.leader(_others(stage, mute))
        stage.flow()


def links_flapping(stage: Stage) -> None:
    nodes = stage.nodes
    links = nodes.links
    pairs = list(links.proxies)
    stage.notes.append("every link was cut and mended each second, ten times")
    for _ in range(10):
        with nodes.faults.standing(links.cut("flap", pairs)):
            stage.hold(0.3)
        stage.hold(0.7)


def links_slow(stage: Stage) -> None:
    fault = stage.nodes.links.slow(
        "slow links", latency_ms=150, jitter_ms=100, kilobytes_per_s=10, slice_bytes=64
    )
    stage.no_submit_fails()
    with stage.during(fault):
        stage.flow(20, 60.0)
        stage.hold(CUT_S)


def links_stale(stage: Stage) -> None:
    nodes = stage.nodes
    pairs = list(nodes.links.proxies)
    for delay_ms in (300, 700, 1_500):
        with nodes.faults.standing(nodes.links.held("stale messages", pairs, delay_ms)):
            for _ in range(3):
                stage.hold(stage.random.uniform(0.2, 0.6))
                # Both dial again at once; what the old connection still holds arrives after that, or never.
                nodes.links.reset([stage.random.choice(pairs)])
    stage.notes.append("messages were held for up to 1.5 s while their links were dialled again, nine times")


CUTS = (
    Scenario(
        1,
        "leader-isolated",
        "both links of the leader are cut",
        "a new leader; the old one confirms nothing",
        leader_isolated,
        smoke=True,
    ),
    Scenario(
        2,
        "follower-isolated",
        "both links of a follower are cut",
        "clients see no error; no election",
        follower_isolated,
        smoke=True,
    ),
    Scenario(
        3,
        "all-apart",
        "every link is cut",
        "nothing is claimed; running work ends settled or suspect",
        all_apart,
        smoke=True,
    ),
    Scenario(
        4, "bridge", "one link of three is cut", "available, bounded growth of terms", bridge, smoke=True
    ),
    Scenario(
        5, "follower-deaf", "a follower hears nobody, and is heard", "the quorum goes on", follower_deaf
    ),
    Scenario(
        6,
        "leader-mute",
        "nobody hears the leader, and it hears all",
        "it steps down within 2 s, another leads",
        leader_mute,
        smoke=True,
    ),
    Scenario(
        7, "links-flapping", "every link is cut for 0.3 s of each second", "no livelock", links_flapping
    ),
    Scenario(
        8,
        "links-slow",
        "150 ± 100 ms, 10 KB/s, in slices of 64 bytes",
        "slower, and nothing else",
        links_slow,
    ),
    Scenario(
        40,
        "links-stale",
        "messages are held back while their links are dialled again",
        "nothing committed is cut",
        links_stale,
    ),
)
