"""checks.file: the effect is a file."""

from __future__ import annotations

from pathlib import Path

from oncekeeper import App, checks
from oncekeeper.context import CurrentTask


def test_the_template_knows_the_arguments_and_the_task(tmp_path: Path) -> None:
    app = App("shop")

    @app.task(on_doubt=checks.file(str(tmp_path) + "/{order_id}-{suffix}-{task_id}.pdf"))
    def invoice(order_id: int, *, suffix: str = "a") -> None: ...

    handler, current = invoice.handler, CurrentTask(9, "shop.invoice", 1)
    arguments = handler.decode(b'{"order_id": 3}')
    assert handler.on_doubt == "check"
    assert handler.check(current, arguments) is False
    (tmp_path / "3-a-9.pdf").touch()
    assert handler.check(current, arguments) is True


def test_a_function_gives_the_path_from_the_arguments(tmp_path: Path) -> None:
    def place(order_id: int) -> Path:
        return tmp_path / f"{order_id}"

    check = checks.file(place)
    assert check.took_effect(CurrentTask(9, "x", 1), {"order_id": 3}) is False
    (tmp_path / "3").mkdir()
    assert check.took_effect(CurrentTask(9, "x", 1), {"order_id": 3}) is True


def test_a_path_that_cannot_be_looked_at_cannot_tell() -> None:
    assert checks.file("x" * 5000).took_effect(CurrentTask(9, "x", 1), {}) is None
