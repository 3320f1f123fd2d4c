"""Somebody else's application as a target: which tasks are submitted to it."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from chaos.scenarios.load import Kind
from node.cli.output import CliError
from node.cli.starting import check_application
from node.config import ConfigError
from node.supervisor import child_environment
from oncekeeper.app import load_app

ASK_S = 60


class BadTarget(Exception):
    """The application, or the load for it, cannot be used; the message says why."""


def kinds_of(app: str, app_dir: Path, load: Path | None) -> tuple[Kind, ...]:
    """What to submit: the lines of ``load``, or each handler that needs no argument."""
    try:
        check_application(app, app_dir)
    except (CliError, ConfigError) as error:
        raise BadTarget(str(error)) from error
    handlers = _describe(app, app_dir)
    if load is not None:
        return _from_lines(load, handlers)
    free = tuple(Kind(name, about["policy"], (b"{}",)) for name, about in handlers.items() if about["free"])
    if not free:
        raise BadTarget(
            f"app={app}: every handler needs arguments ({', '.join(handlers)}); say which with --load FILE, "
            'JSON lines like {"handler": "shop.charge", "body": {"order_id": 1}}'
        )
    return free


def describe(app: str, app_dir: str) -> dict[str, dict[str, Any]]:
    """Run in a process of its own: the application is the user's code."""
    return {
        name: {
            "policy": handler.on_doubt,
            "free": all(
                each.default is not inspect.Parameter.empty
                for each in inspect.signature(handler.function).parameters.values()
                if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
            ),
        }
        for name, handler in load_app(app, app_dir).handlers.items()
    }


def _describe(app: str, app_dir: Path) -> dict[str, dict[str, Any]]:
    script = (
        "import json, sys; from chaos.scenarios.targets import describe; "
        "told = json.dumps(describe(sys.argv[1], sys.argv[2])); print('\\n' + told)"
    )
    asked = subprocess.run(
        [sys.executable, "-P", "-c", script, app, str(app_dir)],
        capture_output=True,
        text=True,
        env=child_environment(),
        timeout=ASK_S,
        check=False,
    )
    if asked.returncode:
        raise BadTarget(f"app={app} cannot be loaded:\n{asked.stderr[-1000:]}")
    # The application may print at its import; the last line is ours.
    found: dict[str, dict[str, Any]] = json.loads(asked.stdout.splitlines()[-1])
    return found


def _from_lines(load: Path, handlers: dict[str, dict[str, Any]]) -> tuple[Kind, ...]:
    bodies: dict[str, list[bytes]] = {}
    try:
        text = load.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadTarget(f"load={load} cannot be read: {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            task = json.loads(line)
            handler, body = task["handler"], task["body"]
        except (ValueError, KeyError, TypeError) as error:
            raise BadTarget(
                f'{load}, line {number}: must be JSON like {{"handler": "shop.charge", "body": {{…}}}} ({error!r})'
            ) from error
        if handler not in handlers:
            raise BadTarget(f"{load}, line {number}: handler={handler} is none of {', '.join(handlers)}")
        bodies.setdefault(handler, []).append(json.dumps(body).encode())
    if not bodies:
        raise BadTarget(f"load={load} holds no tasks")
    return tuple(Kind(name, handlers[name]["policy"], tuple(some)) for name, some in bodies.items())
