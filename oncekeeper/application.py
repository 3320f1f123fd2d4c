"""Finding a user's application by its name."""

from __future__ import annotations

import importlib
import os
import sys

from oncekeeper.app import App
from oncekeeper.errors import ApplicationError


def load_app(target: str, app_dir: str | os.PathLike[str] | None = None) -> App:
    """The verified application that ``target`` ("package.module:name") names; ApplicationError says why not.

    ``app_dir`` goes to the front of ``sys.path``.
    """
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise ApplicationError(f"app={target!r} must be MODULE:NAME, such as shop.tasks:app")
    if app_dir is not None:
        directory = os.path.abspath(app_dir)
        if not os.path.isdir(directory):
            raise ApplicationError(f"app={target!r}: the directory {directory} does not exist")
        if directory not in sys.path:
            sys.path.insert(0, directory)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        # Whatever the user's module raises at import: the node must say so and not start.
        place = f" (from {os.path.abspath(app_dir)})" if app_dir is not None else ""
        raise ApplicationError(
            f"app={target!r}: importing {module_name}{place} failed: {type(error).__name__}: {error}"
        ) from error
    found: object = module
    for name in attribute.split("."):
        found = getattr(found, name, None)
    if not isinstance(found, App):
        apps = [name for name, value in vars(module).items() if isinstance(value, App)]
        hint = f"; it has {', '.join(apps)}" if apps else ""
        raise ApplicationError(
            f"app={target!r}: {module_name} has no App named {attribute!r} (found {type(found).__name__}){hint}"
        )
    if not found.handlers:
        raise ApplicationError(f"app={target!r}: {found.name} has no tasks")
    try:
        found.verify()
    except ApplicationError as error:
        raise ApplicationError(f"app={target!r}: {error}") from None
    return found
