"""An application with a schedule in its code, or without: ONCE_TEST_SCHEDULE says which version of it this is."""

from __future__ import annotations

import os
from pathlib import Path

from oncekeeper import App, current_task
from tests.support.real_sink import Sink

app = App("timed")
sink = Sink(Path(os.environ["ONCE_TEST_HOME"]) / "effects")


@app.task(schedule=os.environ.get("ONCE_TEST_SCHEDULE") or None, on_doubt="check")
def tick(note: str = "") -> None:
    task = current_task()
    sink.append(task.id_text, task.fence)


@tick.check
def was_ticked(note: str = "") -> bool:
    return sink.has(current_task().id_text)
