"""How a bug is planted: a piece of a function's source is replaced for the length of a run."""

from __future__ import annotations

import contextlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import raft.ledger


@dataclass(frozen=True)
class Plant:
    name: str
    what: str
    put_in: Callable[[], AbstractContextManager[None]]


class NoSuchText(Exception):
    """The code has changed, and the plant's text is not in it any more."""


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = inspect.getattr_static(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def altered(function: Any, old: str, new: str) -> Any:
    """The function with a piece of its source replaced, compiled in its own module."""
    function = inspect.unwrap(function)
    source = textwrap.dedent(inspect.getsource(function))
    if old not in source:
        raise NoSuchText(f"{function.__qualname__} has no {old!r}")
    source = source.replace(old, new)
    module = inspect.getmodule(function)
    assert module is not None
    made: dict[str, Any] = {}
    code = compile(
        "from __future__ import annotations\n" + source, f"<planted in {function.__qualname__}>", "exec"
    )
    # The module's own names, so that other stand-ins are seen; the function itself lands in ``made``.
    exec(code, module.__dict__, made)
    return made[function.__name__]


def edit(owner: Any, name: str, old: str, new: str) -> Callable[[], AbstractContextManager[None]]:
    def put_in() -> AbstractContextManager[None]:
        static = inspect.getattr_static(owner, name)
        if isinstance(static, staticmethod):
            return replaced(owner, name, staticmethod(altered(static.__func__, old, new)))
        return replaced(owner, name, altered(static, old, new))

    return put_in


def several(
    *puts: Callable[[], AbstractContextManager[None]],
) -> Callable[[], AbstractContextManager[None]]:
    """One bug that takes more than one place."""

    @contextlib.contextmanager
    def put_in() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for put in puts:
                stack.enter_context(put())
            yield

    return put_in


def rule(
    name: str, command: str, old: str, new: str, module: Any
) -> Callable[[], AbstractContextManager[None]]:
    """A rule of the ledger, which raft/ledger.py keeps in a table."""

    def put_in() -> AbstractContextManager[None]:
        rules = dict(raft.ledger._RULES)
        kind = next(each for each in rules if each.__name__ == command)
        rules[kind] = altered(getattr(module, name), old, new)
        return replaced(raft.ledger, "_RULES", rules)

    return put_in
