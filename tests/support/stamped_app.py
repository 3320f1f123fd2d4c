"""The application of real_app.py, and a handler that says when it began."""

from __future__ import annotations

from oncekeeper import current_task
from tests.support.real_app import HOME, app, sink
from tests.support.stamps import add_stamp, boot_ns

__all__ = ["app"]


@app.task(on_doubt="check", ttr=60, retries=3, retry_delay=0.05)
def stamp(name: str) -> None:
    at_ns = boot_ns()
    task = current_task()
    add_stamp(HOME, task.id_text, task.fence, at_ns)
    sink.append(task.id_text, task.fence)


@stamp.check
def was_stamped(name: str) -> bool:
    return sink.has(current_task().id_text)
