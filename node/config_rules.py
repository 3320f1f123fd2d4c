"""What must hold of a node's settings beyond each one's own bounds; ConfigError names the field and the rule."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from node.addresses import NODE_ID, NODE_ID_RULE, ConfigError, Peer
from node.settings import SETTINGS, NodeConfig

if TYPE_CHECKING:
    from oncekeeper.log.opening import Place

APP = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")

DELAY_STEPS = ("before_defer", "after_defer", "after_fetch", "before_drop", "after_drop")
# On the leader, where there are schedules (node/schedules.py).
SCHEDULE_STEPS = ("before_fire", "after_fire", "after_fire_append", "after_launch")
CRASH_STEPS = (
    "before_claim",
    "after_claim",
    "before_settle",
    "after_settle",
    "before_commit",
    "after_commit",
)


def check_identity(node_id: str, cluster_id: str, peers: Mapping[str, Peer]) -> None:
    if not NODE_ID.fullmatch(node_id):
        raise ConfigError(
            f"node_id={node_id!r} {NODE_ID_RULE}",
            "node_id",
        )
    if not re.fullmatch(r"[0-9a-f]{32}", cluster_id):
        raise ConfigError(f"cluster_id={cluster_id!r} must be 32 hexadecimal digits", "cluster_id")
    if node_id not in peers:
        raise ConfigError(f"node_id={node_id!r} must be one of peers ({', '.join(sorted(peers))})", "node_id")


def check_together(config: NodeConfig) -> None:
    check_app(config.app)
    if config.fence_margin_ms >= config.session_timeout_ms:
        raise ConfigError(
            f"fence_margin_ms={config.fence_margin_ms} must be below "
            f"session_timeout_ms={config.session_timeout_ms}: work must stop before its session can lapse",
            "fence_margin_ms",
        )
    room_ms = config.session_timeout_ms - config.fence_margin_ms
    if config.heartbeat_ms * 2 > room_ms:
        raise ConfigError(
            f"heartbeat_ms={config.heartbeat_ms} must be at most half of session_timeout_ms - "
            f"fence_margin_ms = {room_ms}: else one late heartbeat stops the node's work",
            "heartbeat_ms",
        )
    if config.consumes and config.app and config.cpu_workers + config.io_workers == 0:
        raise ConfigError(
            "cpu_workers=0 and io_workers=0 leave nothing to run tasks: set one of them, or consumes=false",
            "cpu_workers",
        )
    _check_exposure(config)
    if config.raft == config.http:
        raise ConfigError(f"raft={config.raft} and http={config.http} must be two ports", "raft")
    if config.log != "embedded":  # which is always there: commands that only ask need not load any log
        check_log(config.log_place)
    check_crash_at(config.crash_at)


def _check_exposure(config: NodeConfig) -> None:
    """What passes beyond this machine is encrypted: a setting that was forgotten must not lay it open."""
    node = config.node_id
    raft = {"raft": config.raft} | {f"peers.{name}.raft": peer.raft for name, peer in config.peers.items()}
    http = {"http": config.http} | {f"peers.{name}.http": peer.http for name, peer in config.peers.items()}
    for switch, on, addresses in (("tls", config.tls, raft), ("http_tls", config.http_tls, http)):
        for name, address in addresses.items():
            if not on and not address.is_loopback:
                raise ConfigError(
                    f"{name}={address} is beyond loopback, where {switch}=true must be set: what passes there "
                    f"can be read and changed by others (certificates for {node}: oncekeeper certs init)",
                    name,
                )


def check_crash_at(text: str) -> None:
    step, _, times = text.partition(":")
    steps = CRASH_STEPS + DELAY_STEPS + SCHEDULE_STEPS
    if text and (step not in steps or (times and not (times.isascii() and times.isdigit()))):
        raise ConfigError(
            f"crash_at={text!r} must be STEP or STEP:N, with a step of {', '.join(steps)}", "crash_at"
        )


def check_app(app: str) -> None:
    if app and not APP.fullmatch(app):
        raise ConfigError(f"app={app!r} must be MODULE:APP, as in shop.tasks:app", "app")


def check_log(place: Place) -> None:
    """A log's scheme must be a plugin that is installed, and the rest be as that one wants it."""
    from oncekeeper.errors import LogUnusable
    from oncekeeper.log.opening import plugin_of

    try:
        plugin_of(place.url).check(place)
    except (LogUnusable, ValueError) as error:
        field = str(error).partition("=")[0]
        raise ConfigError(str(error), field if field in SETTINGS else "log") from None
