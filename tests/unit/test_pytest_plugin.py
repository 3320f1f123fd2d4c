"""The plugin as users meet it: the examples of docs/testing.md run as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

DOCUMENT = Path(__file__).parents[2] / "docs" / "testing.md"
FILE = re.compile(r"^`(\w+\.py)`:\n\n```python\n(.*?)^```$", re.M | re.S)
INSTALLED = any(each.value == "chaos.pytest_plugin" for each in entry_points(group="pytest11"))
# By its entry point where this checkout is installed with it.
PLUGIN = () if INSTALLED else ("-p", "chaos.pytest_plugin")


@pytest.fixture(autouse=True)
def _this_checkout(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{DOCUMENT.parents[1]}:{pytester.path}")


@pytest.fixture
def examples(pytester: pytest.Pytester) -> pytest.Pytester:
    for name, source in FILE.findall(DOCUMENT.read_text()):
        (pytester.path / name).write_text(source)
    return pytester


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return pytester.runpytest_subprocess(*PLUGIN, "-p", "no:cacheprovider", "--strict-markers", *arguments)


def test_the_lying_check_of_the_document_fails_with_the_report_of_the_document(
    examples: pytest.Pytester,
) -> None:
    result = run(examples, "test_receipt.py")
    result.assert_outcomes(failed=1)
    (report,) = re.findall(r"^```text\n(.*?)^```$", DOCUMENT.read_text(), re.M | re.S)
    said = [line.removeprefix("E").strip().removeprefix("AssertionError: ") for line in result.outlines]
    for line in report.splitlines():
        assert line.strip() in said, "\n".join(result.outlines)


def test_the_other_examples_of_the_document_pass(examples: pytest.Pytester) -> None:
    result = run(examples, "test_mended.py", "test_cluster.py")
    result.assert_outcomes(passed=5)


def test_the_checks_of_the_shop_that_we_ship_tell_the_truth(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile("""
        import sqlite3

        import oncekeeper.examples.shop as shop


        def charges(order_id, amount_cents):
            try:
                with sqlite3.connect(shop.HOME / "money.db") as database:
                    query = "SELECT count(*) FROM effects WHERE order_id = ?"
                    return database.execute(query, (order_id,)).fetchone()[0]
            except sqlite3.OperationalError:
                return 0  # the first run makes the file and the table


        def receipts(order_id, to):
            file = shop.HOME / "receipts.txt"
            return file.read_text().splitlines().count(f"{order_id} {to}") if file.exists() else 0


        def test_charge(oncekeeper_crash_points):
            report = oncekeeper_crash_points(
                shop.charge, lambda number: {"order_id": number, "amount_cents": 5}, effects=charges
            )
            assert {each.effect for each in report.findings if each.place.call == "commit"} == {"once"}


        def test_receipt(oncekeeper_crash_points):
            oncekeeper_crash_points(
                shop.send_receipt, lambda number: {"order_id": number, "to": "ana"}, effects=receipts
            )
    """)
    monkeypatch.setenv("SHOP_DIR", str(pytester.path / "data"))
    run(pytester).assert_outcomes(passed=2)


def test_a_run_that_uses_no_fixture_imports_nothing(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import sys

        def test_nothing_is_imported():
            ours = {"dedup", "raft", "node", "oncekeeper", "chaos"}
            found = {name for name in sys.modules if name.split(".")[0] in ours}
            assert found <= {"chaos", "chaos.pytest_plugin"}
    """)
    run(pytester).assert_outcomes(passed=1)


def test_the_fixtures_tell_what_they_are(pytester: pytest.Pytester) -> None:
    listed = run(pytester, "--fixtures", "-q").stdout.str()
    assert "oncekeeper_cluster" in listed
    assert "oncekeeper_crash_points" in listed
    assert "@pytest.mark.oncekeeper(nodes=3)" in run(pytester, "--markers").stdout.str()


def test_the_plugin_is_declared_for_pytest() -> None:
    declared = (DOCUMENT.parents[1] / "pyproject.toml").read_text()
    assert '[project.entry-points.pytest11]\noncekeeper = "chaos.pytest_plugin"' in declared
    code = "import chaos.pytest_plugin, sys; print('node' in sys.modules)"
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=DOCUMENT.parents[1], capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == "False"
