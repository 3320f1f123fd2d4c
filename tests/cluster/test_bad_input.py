"""What a user may get wrong, typed as a user types it: what is said, and that nothing was half done.

The same rules stand in unit and contract tests, case by case; here they are seen from outside.
"""

import json
import shutil
import subprocess
import sys

import pytest

from node.cluster import create
from node.supervisor import child_environment
from oncekeeper import Client, InvalidTask
from tests.support.cli_shop import command, oncekeeper, until, write_app

STATES = ("waiting", "delayed", "running", "suspect", "executed", "dead", "cancelled")


# --- before a cluster is made -------------------------------------------------------------------------

APPS = {
    "twice": (
        "@app.task\ndef one() -> None: ...\n@app.task(name='one')\ndef other() -> None: ...\n",
        "two tasks of one name: bad.one is bad.one (",
    ),
    "import": ("import no_such_module_anywhere\n", "No module named 'no_such_module_anywhere'"),
    "syntax": ("def f(:\n", "SyntaxError: invalid syntax"),
    "exit": ("raise SystemExit(3)\n", "failed: SystemExit: 3"),
    "no check": (
        "@app.task(on_doubt='check')\ndef f() -> None: ...\n",
        'bad.f: on_doubt="check" needs a check',
    ),
    "ttr": (
        "@app.task(ttr=-1)\ndef f() -> None: ...\n",
        "bad.f: ttr=-1 must be from 0.001 to 604800 seconds",
    ),
    "doubt": (
        "@app.task(on_doubt='maybe')\ndef f() -> None: ...\n",
        "bad.f: on_doubt='maybe' must be one of",
    ),
    "no tasks": ("", "bad has no tasks"),
}


@pytest.mark.parametrize(("text", "said"), APPS.values(), ids=APPS)
def test_an_application_that_cannot_work_leaves_no_directory(tmp_path, text, said):
    (tmp_path / "bad.py").write_text("from oncekeeper import App\napp = App('bad')\n" + text)
    refused = oncekeeper(tmp_path, "cluster", "up", "--app", "bad:app", "--detach", expect=1)
    assert refused["error"].startswith(f"app=bad:app cannot be loaded from {tmp_path}; nothing was started:")
    assert said in refused["error"]
    assert not (tmp_path / "oncekeeper-data").exists()


def test_the_users_own_line_is_shown_and_none_of_ours(tmp_path):
    (tmp_path / "bad.py").write_text("\nimport no_such_module_anywhere\n")
    refused = oncekeeper(tmp_path, "cluster", "up", "--app", "bad:app", "--detach", expect=1)
    assert f'File "{tmp_path}/bad.py", line 2' in refused["error"]
    assert refused["error"].count('File "') == 1


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("FENCE_MARGIN_MS", "4000", "fence_margin_ms=4000 must be below session_timeout_ms=4000"),
        ("HEARTBEAT_MS", "2000", "heartbeat_ms=2000 must be at most half of"),
        ("PARTITIONS", "5", "partitions=5 (environment) must be 12"),
        ("SESSION_TIMEOUT_MS", "soon", "session_timeout_ms='soon' must be a whole number"),
        (
            "FENCE_MARGN_MS",
            "5",
            "ONCEKEEPER_FENCE_MARGN_MS is no setting; the nearest is ONCEKEEPER_FENCE_MARGIN_MS",
        ),
    ],
)
def test_a_setting_that_a_node_would_refuse_leaves_no_directory(tmp_path, monkeypatch, variable, value, said):
    write_app(tmp_path)
    monkeypatch.setenv(f"ONCEKEEPER_{variable}", value)
    refused = oncekeeper(tmp_path, "cluster", "up", "--app", "mini:app", "--detach", expect=2)
    assert refused["error"].startswith(said)
    assert not (tmp_path / "oncekeeper-data").exists()


def test_a_file_in_the_place_of_the_directory_is_named(tmp_path):
    write_app(tmp_path)
    (tmp_path / "here").touch()
    asked = ("cluster", "up", "--app", "mini:app", "--detach", "--dir", "here")
    refused = oncekeeper(tmp_path, *asked, expect=1)
    assert refused["error"] == f"{tmp_path}/here: is a file; name a directory"


# --- a directory that is not what it should be --------------------------------------------------------


def test_a_newer_node_file_is_refused_before_any_node_is_started(tmp_path):
    write_app(tmp_path)
    cluster = create(tmp_path / "oncekeeper-data", nodes=3, app="mini:app", app_dir=tmp_path)
    file = cluster.config_path("n2")
    file.write_text(file.read_text().replace("format = 1", "format = 2"))
    refused = oncekeeper(tmp_path, "cluster", "up", "--detach", expect=2)
    assert refused["error"].startswith(f"{file}: format=2 is newer than format=1")
    assert not (cluster.dir / "supervisor.log").exists()


def node_ends_with(cluster, code):
    """Start one node as the supervisor does; what it says as it ends."""
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "node", "--config", str(cluster.config_path("n1"))],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == code, ran.stderr
    return ran.stderr.splitlines()


@pytest.mark.parametrize(("part", "code"), [("nodes/n1/raft", 2), ("log", 1)])
def test_data_of_another_cluster_is_refused_in_one_line_that_names_the_file(tmp_path, part, code):
    write_app(tmp_path)
    ours = create(tmp_path / "ours", nodes=1, app="mini:app", app_dir=tmp_path)
    oncekeeper(tmp_path, "cluster", "up", "--app", "mini:app", "--nodes", "1", "--detach", "--dir", "theirs")
    oncekeeper(tmp_path, "cluster", "down", "--dir", "theirs")
    shutil.copytree(tmp_path / "theirs" / part, ours.dir / part, dirs_exist_ok=True)
    *_, last = node_ends_with(ours, code)
    assert last.startswith(f"error: {ours.dir / part}")
    assert f"{ours.cluster_id}" in last


# --- tasks ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    write_app(folder)
    oncekeeper(folder, "cluster", "up", "--app", "mini:app", "--nodes", "1", "--detach")
    yield folder
    oncekeeper(folder, "cluster", "down", "--timeout", "5")


def stored(folder):
    counts = oncekeeper(folder, "status")["tasks"]
    return sum(counts[state] for state in STATES)


ADD = '{"a": 1, "b": 2}'
TASKS = {
    "unknown handler": (
        ["mini.ad", "--body", ADD],
        "handler: 'mini.ad' is not registered; the application has:",
    ),
    "wrong type": (["mini.add", "--body", '{"a": 1, "b": "2"}'], "body: mini.add: b: expected int, got str"),
    "missing argument": (["mini.add", "--body", '{"a": 1}'], "body: mini.add: b: missing"),
    "unknown argument": (
        ["mini.add", "--body", '{"a": 1, "b": 2, "c": 3}'],
        "body: mini.add: c: unknown field",
    ),
    "long ttr": (
        ["mini.add", "--body", ADD, "--ttr", "8d"],
        "ttr_ms: must be from 0 (the handler's own) to 604800000",
    ),
    "empty key": (["mini.add", "--body", ADD, "--key", ""], "key: must have 1 to 512 bytes, not 0"),
    "odd queue": (["mini.add", "--body", ADD, "--queue", "a b"], "queue: must match"),
}


@pytest.mark.parametrize(("words", "said"), TASKS.values(), ids=TASKS)
def test_a_task_that_cannot_run_is_refused_by_field_and_rule(folder, words, said):
    before = stored(folder)
    assert oncekeeper(folder, "submit", *words, expect=1)["error"].startswith(said)
    assert stored(folder) == before


LINES = {
    "large body": ({"body": {"a": 1, "b": "x" * 300_000}}, "body: has 300014 bytes, the most is 262144"),
    "id that was never given out": (
        {"body": {"a": 1, "b": 2}, "id": "9" * 15},
        "id: 999999999999999 is outside every",
    ),
    "id that is none": ({"body": {"a": 1, "b": 2}, "id": "kx"}, "id: id='kx' must be decimal digits, or 'k'"),
    "negative ttr": ({"body": {"a": 1, "b": 2}, "ttr_ms": -1}, "ttr_ms: must be from 0"),
    "id at odds with key": (
        {"body": {"a": 1, "b": 2}, "id": "k" + "0" * 32, "key": "mine"},
        f"id: k{'0' * 32} disagrees with key='mine'",
    ),
    "unknown field": ({"body": {"a": 1, "b": 2}, "delay": 5}, "delay: unknown field"),
    "newer version": ({"body": {"a": 1, "b": 2}, "v": 2}, "v: this version understands 1, not 2"),
}


@pytest.mark.parametrize(("message", "said"), LINES.values(), ids=LINES)
def test_one_wrong_line_of_a_file_is_named_by_its_number_and_none_is_stored(folder, message, said):
    before = stored(folder)
    good = json.dumps({"body": {"a": 1, "b": 2}})
    (folder / "tasks.jsonl").write_text(f"{good}\n\n{json.dumps(message)}\n{good}\n")
    refused = oncekeeper(folder, "submit", "mini.add", "--file", "tasks.jsonl", expect=1)
    assert refused["error"].startswith(f"tasks.jsonl, line 3: {said}")
    assert stored(folder) == before


def test_a_client_without_the_application_learns_by_the_dead_letter(folder):
    client = Client(folder / "oncekeeper-data")
    for body, said in [
        ({"a": 1}, "mini.add: b: missing"),
        ({"a": 1, "b": []}, "mini.add: b: expected int, got array"),
    ]:
        handle = client.submit("mini.add", body)
        until(lambda handle=handle: handle.status() == "dead", "the worker has refused the body")
        assert oncekeeper(folder, "task", "show", handle.id)["aside"]["reason"] == said
    with pytest.raises(InvalidTask, match=r"handler: .mini\.gone. is not registered"):
        client.submit("mini.gone", {})
    handle = client.submit("mini.gone", {}, queue="default")  # said so, no node is asked
    until(lambda: handle.status() == "dead", "no handler is found")
    assert (
        "handler='mini.gone' is not registered"
        in oncekeeper(folder, "task", "show", handle.id)["aside"]["reason"]
    )
    with pytest.raises(InvalidTask, match="ttr_ms: must be from 0"):
        client.submit("mini.add", {"a": 1, "b": 2}, ttr=-1)


def test_without_json_an_error_is_one_line_on_standard_error(folder):
    ran = subprocess.run(
        command("submit", "mini.add", "--body", "{}"),
        cwd=folder,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (1, "", "error: body: mini.add: a: missing\n")
