"""`certs init|add|show`: the authority and the certificates of a cluster."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from node.cli.connection import directory_of
from node.cli.output import BAD_USAGE, DONE, CliError, JsonOption, note, print_json, print_table

if TYPE_CHECKING:
    from node.certs import CertFiles
    from node.cluster import Cluster

certs_app = typer.Typer(help="The cluster's certificates.", no_args_is_help=True)

DirOption = Annotated[
    str | None,
    typer.Option(
        "--dir",
        "--cluster",
        help="The data directory; certificates are in certs/. By default ONCEKEEPER_CLUSTER or ./oncekeeper-data.",
    ),
]
HostsOption = Annotated[
    str,
    typer.Option(
        "--hosts",
        help="By which addresses or DNS names clients reach the nodes: HOST,… for all, NODE=HOST,… for one.",
    ),
]
DaysOption = Annotated[int, typer.Option("--days", help="Days until the node's certificate ends.")]
WARN_DAYS = 30


@certs_app.command("init")
def init(
    dir: DirOption = None,
    nodes: Annotated[str, typer.Option("--nodes", help="n1,n2,…; those of the directory by default.")] = "",
    hosts: HostsOption = "",
    days: DaysOption = 825,
    cluster_id: Annotated[
        str, typer.Option("--cluster-id", help="For a directory without cluster.json; drawn by default.")
    ] = "",
    json: JsonOption = False,
) -> int:
    """Make an authority, and a key and certificate for each node. A cluster that is here goes over to TLS."""
    from node.certs import CertFiles, describe, issue, make_all
    from node.cluster import CERTS, change_shared, exists, open_cluster

    directory = directory_of(dir)
    cluster = open_cluster(directory) if exists(directory) else None
    named = _names(nodes) or (list(cluster.peers) if cluster else [])
    if not named:
        raise CliError(f"nodes is missing: {directory} holds no cluster, so say --nodes n1,n2,…", BAD_USAGE)
    if cluster is not None:
        if cluster_id not in ("", cluster.cluster_id):
            raise CliError(
                f"cluster-id={cluster_id} must be {cluster.cluster_id}, as in cluster.json", BAD_USAGE
            )
        if missing := [name for name in cluster.peers if name not in named]:
            raise CliError(f"nodes={nodes} leaves out {', '.join(missing)}: every node needs one", BAD_USAGE)
        _refuse_running(cluster)
    identity = cluster.cluster_id if cluster else cluster_id or secrets.token_hex(16)
    if len(identity) != 32 or not set(identity) <= set("0123456789abcdef"):
        raise CliError(f"cluster-id={identity} must be 32 hexadecimal digits", BAD_USAGE)
    files = CertFiles(cluster.certs_dir if cluster else directory / CERTS)
    wanted = _hosts(hosts, named, cluster)
    if cluster is not None and not cluster.tls and files.authority_key.exists():
        # An earlier call was cut short: go on where it stood.
        for name in named:
            issue(files, identity, name, wanted[name], days=days, replace=True)
    else:
        make_all(files, identity, wanted, days=days)
    if cluster is not None and not (cluster.tls and cluster.http_tls):
        change_shared(directory, {"tls": True, "http_tls": True})
    if json:
        print_json({"dir": str(files.dir), "cluster_id": identity, "certificates": _rows(files)})
        return DONE
    print_table(COLUMNS, [_cells(info) for info in describe(files)])
    if cluster is not None:
        print(f"\nthe cluster in {directory} speaks TLS from its next start on")
    else:
        print(
            f"\neach node takes ca.pem, NODE.pem and NODE.key of {files.dir} to its certs_dir, with the settings\n"
            f'cluster_id = "{identity}", tls = true, http_tls = true. ca.key stays off the nodes.'
        )
    return DONE


@certs_app.command("add")
def add(
    node: Annotated[str, typer.Argument(help="The node that the certificate is for.")],
    dir: DirOption = None,
    hosts: HostsOption = "",
    days: DaysOption = 825,
    replace: Annotated[
        bool, typer.Option("--replace", help="A new key and certificate for the old.")
    ] = False,
    json: JsonOption = False,
) -> int:
    """A key and a certificate for one node; it takes them at its next start."""
    from node.certs import cluster_of, hosts_of, issue
    from node.cluster import exists, open_cluster

    directory = directory_of(dir)
    cluster = open_cluster(directory) if exists(directory) else None
    files = _files(directory, cluster)
    cluster_id = cluster.cluster_id if cluster else cluster_of(files)
    if cluster_id is None:
        raise CliError(f"{files.dir}: no certificate there tells of which cluster it is; see `certs init`")
    wanted = _hosts(hosts, [node], cluster)[node] or hosts_of(files, node)
    issue(files, cluster_id, node, wanted, days=days, replace=replace)
    rows = [row for row in _rows(files) if row["file"] == files.certificate(node).name]
    if json:
        print_json(rows[0])
    else:
        print(
            f"{files.certificate(node)}: good until {rows[0]['expires']}; {node} takes it at its next start"
        )
    return DONE


@certs_app.command("show")
def show(dir: DirOption = None, json: JsonOption = False) -> int:
    """Every certificate: for whom, by which names, until when."""
    from node.certs import describe
    from node.cluster import exists, open_cluster

    directory = directory_of(dir)
    files = _files(directory, open_cluster(directory) if exists(directory) else None)
    if json:
        print_json({"dir": str(files.dir), "certificates": _rows(files)})
        return DONE
    found = describe(files)
    print_table(COLUMNS, [_cells(info) for info in found])
    for info in found:
        if not info.trusted:
            note(f"{info.file}: no authority in ca.pem signed it; nobody will accept it")
        elif info.days_left < WARN_DAYS:
            note(f"{info.file}: {'has ended' if info.days_left < 0 else 'ends soon'}; see docs/security.md")
    return DONE


COLUMNS = ("file", "names", "from", "until", "days left#", "key")


def _cells(info: object) -> tuple[object, ...]:
    from node.certs import CertInfo

    assert isinstance(info, CertInfo)
    names = ", ".join(info.names) or info.subject
    return (info.file, names, f"{info.not_before:%F}", f"{info.not_after:%F}", info.days_left, info.has_key)


def _rows(files: CertFiles) -> list[dict[str, object]]:
    from node.certs import describe

    return [
        {
            "file": info.file,
            "subject": info.subject,
            "names": list(info.names),
            "valid_from": f"{info.not_before:%FT%TZ}",
            "expires": f"{info.not_after:%FT%TZ}",
            "days_left": info.days_left,
            "key": info.has_key,
            "trusted": info.trusted,
        }
        for info in describe(files)
    ]


def _files(directory: Path, cluster: Cluster | None) -> CertFiles:
    from node.certs import CertFiles
    from node.cluster import CERTS

    return CertFiles(cluster.certs_dir if cluster else directory / CERTS)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _hosts(text: str, nodes: list[str], cluster: Cluster | None) -> dict[str, list[str]]:
    """For each node: what is said for it or for all, and where the cluster says that it is reached."""
    found: dict[str, list[str]] = {name: [] for name in nodes}
    for item in _names(text):
        node, equals, host = item.rpartition("=")
        if equals and node not in found:
            raise CliError(f"hosts={item}: {node} is none of {', '.join(nodes)}", BAD_USAGE)
        for name in [node] if equals else nodes:
            found[name].append(host)
    for name, hosts in found.items():
        if cluster is not None and name in cluster.peers:
            peer = cluster.peers[name]
            hosts += [address.host for address in (peer.http, peer.raft)]
    return found


def _refuse_running(cluster: Cluster) -> None:
    if running := cluster.running():
        raise CliError(
            f"{', '.join(running)} of {cluster.dir} are running: a node that starts with TLS and one that runs "
            "without cannot speak to each other; run `oncekeeper cluster down` first"
        )
