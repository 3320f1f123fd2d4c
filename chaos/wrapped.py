"""Somebody else's application, each handler told to the sink: when it is entered and when it has returned.

A handler that is killed between its effect and its return leaves no record of the effect, so the sink is not exact
here: what was entered may have taken effect. The check, the policy and everything else stay the application's own.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chaos.sink import EFFECT, START, Sink
from chaos.traps import AFTER, BEFORE, HOME, befall
from oncekeeper import App, current_task
from oncekeeper.app import load_app

APP, APP_DIR = "CHAOS_APP", "CHAOS_APP_DIR"
"""Environment variables: the application that is meant, and where it is."""


def wrap(app: App, home: Path) -> App:
    sink = Sink(home / "effects")
    for handler in app.handlers.values():
        assert handler.signature  # made of the function itself, before it is hidden
        handler.function = _told(handler.function, sink, home)
    return app


def _told(function: Callable[..., Any], sink: Sink, home: Path) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def told_async(*args: Any, **kwargs: Any) -> Any:
            task = current_task()
            sink.append(START, task.id_text, task.fence)
            befall(home, task.id_text, BEFORE)
            result = await function(*args, **kwargs)
            sink.append(EFFECT, task.id_text, task.fence)
            befall(home, task.id_text, AFTER)
            return result

        return told_async

    @functools.wraps(function)
    def told(*args: Any, **kwargs: Any) -> Any:
        task = current_task()
        sink.append(START, task.id_text, task.fence)
        befall(home, task.id_text, BEFORE)
        result = function(*args, **kwargs)
        sink.append(EFFECT, task.id_text, task.fence)
        befall(home, task.id_text, AFTER)
        return result

    return told


def _from_environment() -> App:
    return wrap(load_app(os.environ[APP], os.environ.get(APP_DIR) or None), Path(os.environ[HOME]))


def __getattr__(name: str) -> Any:
    # Only where a node asks for it: importing this module alone must load nobody's application.
    if name != "app":
        raise AttributeError(name)
    globals()["app"] = made = _from_environment()
    return made
