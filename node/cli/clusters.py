"""`cluster up|down|start`, `node` and `config show`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from node.cli.connection import connect_directory, directory_of
from node.cli.output import BAD_USAGE, DONE, FAILED, CliError, JsonOption, note, print_json, print_table

if TYPE_CHECKING:
    from node.cluster import Cluster

cluster_app = typer.Typer(help="Start and stop the nodes of this machine.", no_args_is_help=True)
config_app = typer.Typer(help="A node's configuration.", no_args_is_help=True)

DirOption = Annotated[
    str | None,
    typer.Option(
        "--dir", "--cluster", help="The data directory. By default ONCEKEEPER_CLUSTER or ./oncekeeper-data."
    ),
]


@cluster_app.command("up")
def up(
    nodes: Annotated[int | None, typer.Option("--nodes", help="How many; 3 for a new directory.")] = None,
    app: Annotated[str | None, typer.Option("--app", help="MODULE:APP whose handlers run.")] = None,
    app_dir: Annotated[
        Path | None, typer.Option(help="Where MODULE is; by default the current directory.")
    ] = None,
    log: Annotated[
        str | None, typer.Option("--log", help="The task log: embedded, or kafka://HOST:PORT,…/PREFIX.")
    ] = None,
    partitions: Annotated[
        int | None, typer.Option(help="Of a new task log; on Kafka, of each queue's topic. 12 by default.")
    ] = None,
    kafka_properties: Annotated[
        Path | None, typer.Option(help="For a new directory: a file of librdkafka settings (TLS, SASL).")
    ] = None,
    kafka_replication: Annotated[
        int | None,
        typer.Option(help="Copies of each partition; by default as many as brokers, three at most."),
    ] = None,
    kafka_acks: Annotated[
        str | None, typer.Option(help="What a send waits for: all (default), or 1.")
    ] = None,
    dir: DirOption = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return when the cluster takes work.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart/--no-restart", help="Start again a node that dies.")
    ] = True,
    tls: Annotated[
        bool, typer.Option("--tls/--no-tls", help="For a new directory: TLS between nodes and for the API.")
    ] = True,
    timeout: Annotated[float, typer.Option(help="Seconds until the cluster must take work.")] = 60.0,
    json: JsonOption = False,
) -> int:
    """Start nodes on this machine; an existing directory is resumed."""
    from node.cli.starting import SupervisorLog, bring_down, prepare, wait_ready
    from node.cluster import Locked, is_held, lock_holder, refuse_taken_ports
    from node.supervisor import start_supervisor

    directory = directory_of(dir)
    # Before anything is changed: a cluster that is up must not be given another application under its feet.
    lock = directory / "supervisor.lock"
    if is_held(lock):
        raise Locked(
            f"the cluster in {directory} is up already (its supervisor is process {lock_holder(lock)})"
        )
    settings = {
        "log": log,
        "partitions": partitions,
        "kafka_properties": None if kafka_properties is None else str(kafka_properties.absolute()),
        "kafka_replication": kafka_replication,
        "kafka_acks": kafka_acks,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    cluster = prepare(directory, nodes=nodes, app=app, app_dir=app_dir, log=given, tls=tls)
    for name in cluster.peers:
        if not is_held(cluster.node_lock(name)):
            refuse_taken_ports(cluster, name)
    if not detach:
        from node.cli.foreground import run_foreground

        return run_foreground(cluster, restart=restart, timeout_s=timeout, as_json=json)
    watched = SupervisorLog(cluster)
    process = start_supervisor(cluster, restart=restart)
    try:
        rows = wait_ready(connect_directory(cluster.dir), timeout, lambda: watched.refuse_failures(process))
    except BaseException:
        # Half a cluster in the background helps nobody.
        bring_down(cluster, timeout_s=10)
        raise
    print_up(cluster, rows, json)
    return DONE


def print_up(cluster: Cluster, rows: list[dict[str, Any]], as_json: bool) -> None:
    from node.cli.watching import print_nodes

    if as_json:
        print_json({"dir": str(cluster.dir), "app": cluster.app, "nodes": rows})
        return
    print_nodes(rows)
    print(f"\n{len(rows)} nodes run {cluster.app}; data in {cluster.dir}")


@cluster_app.command("down")
def down(
    dir: DirOption = None,
    timeout: Annotated[float, typer.Option(help="Seconds until nodes that do not drain are killed.")] = 40.0,
    json: JsonOption = False,
) -> int:
    """Let every node drain and stop. Tasks that wait stay in the log."""
    from node.cli.starting import bring_down, held_locks
    from node.cluster import open_cluster

    cluster = open_cluster(directory_of(dir))
    if not held_locks(cluster):
        if json:
            print_json({"dir": str(cluster.dir), "stopped": [], "killed": []})
        else:
            print(f"nothing is running in {cluster.dir}")
        return DONE
    if not json:
        note(f"draining {', '.join(sorted(held_locks(cluster).keys() - {'supervisor'}))} …")
    stopped, killed = bring_down(cluster, timeout)
    if json:
        print_json({"dir": str(cluster.dir), "stopped": stopped, "killed": killed})
    else:
        print(f"stopped {', '.join(stopped) or 'the supervisor'}")
    if killed:
        note(f"did not drain within {timeout:g} s and were killed: {', '.join(killed)}")
    return FAILED if killed else DONE


@cluster_app.command("start")
def start(
    node: Annotated[str, typer.Argument(help="The node, as in `oncekeeper nodes`.")],
    dir: DirOption = None,
    timeout: Annotated[float, typer.Option(help="Seconds until it must take work.")] = 60.0,
    json: JsonOption = False,
) -> int:
    """Start one node that is down."""
    import time

    from node.cli.starting import POLL_S, output_tail
    from node.cluster import open_cluster
    from node.supervisor import start_node

    cluster = open_cluster(directory_of(dir))
    if node not in cluster.peers:
        raise CliError(f"node={node} is not one of {', '.join(cluster.peers)}", BAD_USAGE)
    process = start_node(cluster, node)
    api = connect_directory(cluster.dir)
    deadline = time.monotonic() + timeout
    said = "it does not answer"
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise CliError(f"{node} ended with {process.returncode}. It said:\n{output_tail(cluster, node)}")
        for target, answer in api.ask_each("/v1/node"):
            if answer is not None and target == cluster.peers[node].http:
                if answer.get("takes_work"):
                    if json:
                        print_json(answer)
                    else:
                        print(f"{node} takes work (process {answer.get('pid')})")
                    return DONE
                said = "it does not take work yet (is there a quorum?)"
        time.sleep(POLL_S)
    raise CliError(f"{node} (process {process.pid}) was started, but after {timeout:g} s {said}")


def node(
    config: Annotated[Path, typer.Option("--config", help="The node's TOML file.")],
    set: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Overrides the file.")
    ] = None,
    json: JsonOption = False,
) -> int:
    """Run one node in the foreground, as a service manager does it."""
    from node.__main__ import run

    return run(config, set or [])


@config_app.command("show")
def show(
    config: Annotated[Path | None, typer.Option("--config", help="A node's TOML file.")] = None,
    node: Annotated[str, typer.Option("--node", help="Or a node of the data directory.")] = "n1",
    dir: DirOption = None,
    set: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Overrides the file.")
    ] = None,
    json: JsonOption = False,
) -> int:
    """Every setting of a node, its value, and where that came from. Checks it, too."""
    from node.__main__ import parse_flags
    from node.cluster import open_cluster
    from node.config import SETTINGS, load_with_origins
    from node.config import show as shown

    if config is None:
        cluster = open_cluster(directory_of(dir))
        if node not in cluster.peers:
            raise CliError(f"node={node} is not one of {', '.join(cluster.peers)}", BAD_USAGE)
        config = cluster.config_path(node)
    loaded = load_with_origins(config, parse_flags(set or []))
    values = shown(loaded.config)
    if json:
        print_json({"config": values, "origins": dict(loaded.origins)})
        return DONE
    # Numbers plainly here: what is shown can be copied into the file.
    rows = [(key, _plain(value), loaded.origins[key], SETTINGS[key].doc) for key, value in values.items()]
    print_table(("setting", "value", "from", "meaning"), rows)
    return DONE


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(value) if isinstance(value, dict) else str(value)
