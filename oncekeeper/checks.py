"""Ready-made check strategies: did a task take effect, although its process died?

``sql``: the best there is. The task's id is inserted as a *mark* in the handler's own database transaction, so
the mark stands exactly if the effect does. It also guards the effect: a transaction whose mark stands already
cannot commit.

``file``: for handlers whose effect is one file, written under another name and renamed when it is whole.

A strategy of your own is any object with the two methods of ``CheckStrategy``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oncekeeper.context import CurrentTask
from oncekeeper.handlers import CheckStrategy

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

    from oncekeeper.sqlmarks import SqlMarks

__all__ = ["CheckStrategy", "file", "sql"]


def sql(engine: Engine | str, table: str = "oncekeeper_effects") -> SqlMarks:
    """Record each task in the transaction in which its handler commits its effect.

    While a handler with this strategy runs, the transaction that it commits on ``engine`` (a SQLAlchemy engine or
    URL; Core or ORM) also inserts the task's id into ``table``, which is made at the first use. Rules:

    - one writing transaction a task: a second one is rolled back with SecondTransaction;
    - in the handler's own thread or asyncio task, and not with isolation_level="AUTOCOMMIT";
    - a transaction of nothing but SELECT is not marked: a function with side effects must not hide in one.

    Needs the extra ``oncekeeper[sql]``.
    """
    from oncekeeper.sqlmarks import SqlMarks  # SQLAlchemy takes a while to import, and may not be there

    return SqlMarks(engine, table)


def file(path: str | Callable[..., str | os.PathLike[str]]) -> FileCheck:
    """The task took effect if a file exists.

    ``path``: a template with the handler's arguments and ``task_id``, as in ``"out/{order_id}.json"``, or a
    function that takes the handler's arguments by name. The handler must write under another name and rename, or
    half a file counts as the whole effect.
    """
    return FileCheck(path)


class FileCheck:
    def __init__(self, path: str | Callable[..., str | os.PathLike[str]]) -> None:
        self._path = path

    def recording(self, task: CurrentTask) -> AbstractContextManager[object]:
        return nullcontext()

    def path(self, task: CurrentTask, arguments: Mapping[str, Any]) -> Path:
        if callable(self._path):
            return Path(self._path(**arguments))
        return Path(self._path.format(**arguments, task_id=task.id_text))

    def took_effect(self, task: CurrentTask, arguments: Mapping[str, Any]) -> bool | None:
        path = self.path(task, arguments)
        try:
            os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return None  # a share that is not mounted, a directory that may not be read: it cannot be told
        return True
