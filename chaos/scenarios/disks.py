"""RELIABILITY 13, 22 to 26 and 36: clocks, disks, and nodes that lost what they had."""

from __future__ import annotations

import errno
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

from chaos.faults import Fault
from chaos.scenarios.evidence import applied_by
from chaos.scenarios.nodes import eventually
from chaos.scenarios.run import Scenario
from chaos.scenarios.stage import S, Stage
from chaos.shim import Shim, no_compiler

HOUR_NS = 3_600 * S
FULL_BYTES = 1  # no file of the process may grow: every write beyond its first byte fails
FAR_BEHIND = {"journal_entries_max": 200}


def _shimmed(stage: Stage, *nodes: str) -> dict[str, Shim]:
    """These nodes, started anew under a shim that does nothing yet."""
    shims = {}
    for node in nodes:
        shims[node] = Shim(stage.nodes.folder, node)
        stage.nodes.stop(node)
        stage.nodes.start(node, env=shims[node].environment)
    stage.nodes.wait_up()
    return shims


def clocks_jump(stage: Stage) -> None:
    """One node an hour ahead, one an hour behind, then all of them strobing."""
    names = stage.nodes.names
    shims = _shimmed(stage, *names)
    stage.no_submit_fails()

    def bend(offsets_ns: list[int]) -> None:
        for shim, offset_ns in zip(shims.values(), offsets_ns, strict=True):
            shim.tell(wall_ns=offset_ns)

    def heal() -> None:
        bend([0] * len(names))

    with stage.during(Fault("clocks an hour apart", names, lambda: bend([HOUR_NS, -HOUR_NS, 0]), heal)):
        stage.flow()
        stage.hold(2.0)
    with stage.during(Fault("clocks strobe", names, lambda: bend([-HOUR_NS, HOUR_NS, 0]), heal)):
        for _ in range(20):
            bend([stage.random.choice((-1, 0, 1)) * HOUR_NS for _ in names])
            stage.hold(0.1)
        stage.flow()

    stage.afterwards.append(
        lambda history: [
            f"{each.node} stopped leading term {each.term} while only wall clocks jumped"
            for each in history.leaders
            if not each.leads and any(struck < each.t_ns < healed for _, struck, healed in stage.strikes)
        ]
    )


def disk_full(stage: Stage) -> None:
    nodes = stage.nodes
    node = nodes.leader()
    pid = nodes.pid(node)

    def limit(bytes_max: int) -> None:
        if nodes.is_running(node) and nodes.pid(node) == pid:
            _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (bytes_max, hard))

    def heal() -> None:
        limit(resource.RLIM_INFINITY)
        nodes.start_dead(node)

    fault = Fault("disk full", (node,), lambda: limit(FULL_BYTES), heal)
    with stage.during(fault):
        others = tuple(each for each in nodes.names if each != node)
        nodes.leader(others)
        stage.flow()
        eventually(f"{node} stops: it can promise nothing any more", lambda: not nodes.is_running(node))
    nodes.wait_up()


def disk_slow(stage: Stage) -> None:
    nodes = stage.nodes
    node = nodes.leader()
    (shim,) = _shimmed(stage, node).values()
    with stage.during(Fault("slow fsync", (node,), lambda: shim.tell(sync_ms=400), shim.tell)):
        stage.flow(20, 60.0)
        stage.hold(3.0)
        stage.notes.append(f"each fsync of {node} took 400 ms longer; {nodes.leader()} leads now")


def disk_fails(stage: Stage) -> None:
    nodes = stage.nodes
    node = nodes.leader()
    (shim,) = _shimmed(stage, node).values()

    def heal() -> None:
        shim.tell()
        nodes.start_dead(node)

    fault = Fault("fsync fails", (node,), lambda: shim.tell(sync_errno=errno.EIO), heal)
    with stage.during(fault):
        eventually(f"{node} stops: what it wrote may be lost", lambda: not nodes.is_running(node), 30.0)
        stage.flow()
    nodes.wait_up()


# --- damage while the node is down --------------------------------------------------------------------------------


def _newest_segment(directory: Path) -> Path:
    return max((p for p in directory.rglob("*") if p.is_file() and p.stat().st_size > 4096), key=_order)


def _order(path: Path) -> tuple[int, str]:
    return (path.stat().st_mtime_ns, path.name)


def _damaged(stage: Stage, name: str, damage: Callable[[Path], str]) -> None:
    """A node is killed, its journal damaged, and it comes back."""
    nodes = stage.nodes
    node = stage.random.choice(nodes.names)
    stage.hold(0.5)  # some more entries
    fault = nodes.killed(node)

    def strike() -> None:
        fault.strike()
        stage.notes.append(f"{node}: {damage(nodes.raft_dir(node))}")

    with stage.during(Fault(name, (node,), strike, fault.heal)):
        stage.flow()
    nodes.wait_up()


def journal_torn(stage: Stage) -> None:
    def tear(raft: Path) -> str:
        segment = _newest_segment(raft / "journal")
        data = segment.read_bytes()
        # What was never used is zeros, where space is taken ahead.
        end = len(data.rstrip(b"\0"))
        cut = stage.random.randrange(1, 9)
        with segment.open("r+b") as file:
            file.seek(end - cut)
            file.write(bytes(cut))
            file.truncate(max(end - cut, len(data) - cut if len(data) == end else len(data)))
        return f"the last {cut} bytes of {segment.name} are gone"

    _damaged(stage, "journal torn", tear)


def journal_flipped(stage: Stage) -> None:
    def flip(raft: Path) -> str:
        segment = _newest_segment(raft / "journal")
        data = segment.read_bytes()
        at = stage.random.randrange(1024, len(data.rstrip(b"\0")) * 3 // 4)
        with segment.open("r+b") as file:
            file.seek(at)
            file.write(bytes([data[at] ^ 1 << stage.random.randrange(8)]))
        return f"one bit of byte {at} of {segment.name} was flipped"

    _damaged(stage, "journal flipped", flip)


def node_replaced(stage: Stage) -> None:
    def wipe(raft: Path) -> str:
        shutil.rmtree(raft)
        return "everything that Raft had stored is gone"

    _damaged(stage, "node replaced", wipe)


def disk_lost(stage: Stage) -> None:
    """The only two that have the newest entries are the leader and a follower; that one loses its disk, the leader
    is down. The third one, which is behind, must not be elected by a voter that has forgotten everything."""
    nodes = stage.nodes
    leader = nodes.leader()
    behind, forgetful = stage.random.sample(nodes.followers(), 2)
    with stage.during(nodes.killed(behind)):
        stage.flow(80)
        with nodes.faults.standing(nodes.killed(leader)):
            nodes.kill(forgetful)
            shutil.rmtree(nodes.raft_dir(forgetful))
            nodes.start(behind, forgetful)
            for _ in range(30):
                led = [node for node, (role, _) in nodes.roles().items() if role == "leader"]
                stage.expect(not led, f"{led} leads by the vote of {forgetful}, which had lost its disk")
                if led:
                    break
                stage.hold(0.1)
    nodes.wait_up()
    stage.notes.append(
        f"{behind} was behind, {forgetful} lost its disk, {leader} was down: nobody led for 3 s"
    )


def far_behind(stage: Stage) -> None:
    """A follower is down for longer than the others keep their journals."""
    nodes = stage.nodes
    node = stage.random.choice(nodes.followers())
    first = nodes.ask(node, "/v1/status?local=1")
    began = int(first["applied_index"]) if first else 0
    with stage.during(nodes.killed(node)):

        def gone() -> bool:
            seen = nodes.ask(nodes.leader(), "/v1/status?local=1")
            return bool(seen and int(seen["applied_index"]) > began + 600)

        eventually("600 entries are applied without it", gone, pause_s=0.1)
    nodes.wait_up()
    applied = applied_by(nodes.witness_path(node))
    missing = sum(index not in applied for index in range(began, began + 600))
    stage.expect(
        missing > 300, f"{node} applied all but {missing} of 600 entries one by one: no snapshot came"
    )
    stage.notes.append(f"{node} was 600 entries behind; {missing} of them came as a snapshot")


DISKS = (
    Scenario(
        13,
        "clocks-jump",
        "wall clocks an hour apart, then strobing",
        "leases and leaders are unaffected",
        clocks_jump,
        needs=no_compiler,
    ),
    Scenario(22, "disk-full", "no file of the leader may grow", "it stops, the others go on", disk_full),
    Scenario(
        23,
        "disk-slow",
        "each fsync of the leader takes 0.4 s longer",
        "slower only",
        disk_slow,
        needs=no_compiler,
    ),
    Scenario(
        23,
        "disk-fails",
        "fsync of the leader fails with EIO",
        "it stops, another leads",
        disk_fails,
        needs=no_compiler,
    ),
    Scenario(
        24, "journal-torn", "the end of a journal is cut off", "cut to the last good record", journal_torn
    ),
    Scenario(
        25,
        "journal-flipped",
        "one bit of a journal is flipped",
        "it does not vote, and rebuilds from its peers",
        journal_flipped,
    ),
    Scenario(
        26,
        "far-behind",
        "a follower is down while the others shorten their journals",
        "full resync, equal digest",
        far_behind,
        settings=FAR_BEHIND,
    ),
    Scenario(
        36,
        "disk-lost",
        "one node loses its disk, another is down, the third is behind",
        "nobody leads before the one that is down is back",
        disk_lost,
        smoke=True,
    ),
    Scenario(
        36,
        "node-replaced",
        "a node comes back with nothing that Raft had stored",
        "never two majorities",
        node_replaced,
    ),
)
