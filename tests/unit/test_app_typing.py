"""What a type checker sees of an application: submit has the signature of the function."""

from __future__ import annotations

import re
from pathlib import Path

from mypy import api

SNIPPET = """
from oncekeeper import App, checks

app = App("shop")

@app.task(ttr=30, on_doubt="check")
def charge(order_id: int, amount_cents: int = 5) -> str:
    return ""

@charge.check
def was_charged(order_id: int, amount_cents: int = 5) -> bool | None:
    return None

@app.task
async def fetch(url: str) -> bytes:
    return b""

@app.task(on_doubt=checks.file("out/{n}"))
def plain(n: int) -> None: ...

async def use() -> None:
    reveal_type(charge(1))
    reveal_type(charge.submit(1, amount_cents=2))
    reveal_type(charge.submit(1).result(timeout=5))
    reveal_type(await charge.submit_async(order_id=1))
    reveal_type(charge.submit_many([(1, 2)])[0].result())
    reveal_type(charge.options(key="k").submit(1).result())
    reveal_type(await fetch("x"))
    reveal_type(fetch.submit("x").result())
    reveal_type(was_charged(1))
    charge.submit("1")            # error
    charge.submit()               # error
    charge.submit(1, colour=2)    # error
    charge.options(key="k").submit(1, key="k")  # error
    charge.options(colour="red")  # error
    fetch.submit(5)               # error
    plain.submit(n="x")           # error

@charge.check                     # error
def wrong(order: str) -> bool:
    return True
"""

REVEALED = ["str", "Handle[str]", "str", "Handle[str]", "str", "str", "bytes", "bytes", "bool | None"]


def test_submit_is_checked_against_the_function(tmp_path: Path) -> None:
    file = tmp_path / "snippet.py"
    file.write_text(SNIPPET)
    root = Path(__file__).parents[2]
    output, problems, _ = api.run(
        [
            "--strict",
            "--no-error-summary",
            f"--config-file={root / 'pyproject.toml'}",
            f"--cache-dir={tmp_path / 'cache'}",
            str(file),
        ]
    )
    assert not problems
    lines = SNIPPET.splitlines()
    wanted = {number for number, line in enumerate(lines, 1) if line.endswith("# error")}
    found = {int(match[1]) for match in re.finditer(r"snippet\.py:(\d+): error", output)}
    assert found == wanted, output
    revealed = re.findall(r'Revealed type is "(.*?)"', output)
    assert [re.sub(r"\b(?:builtins|oncekeeper\.handle)\.", "", text) for text in revealed] == REVEALED
