"""The command line's contract: exit codes, one JSON document, and errors with the field and the rule."""

import json
import subprocess
import sys

import pytest

from node.cli.program import run
from node.cluster import create, free_ports, http_token, read_secret
from tests.support.cli_server import serving

COUNTS = {"waiting": 0, "delayed": 0, "running": 0, "suspect": 1, "executed": 1234, "dead": 0, "cancelled": 0}
STATUS = {"tasks": COUNTS, "held": 1, "idle": True, "fresh": True, "unreachable": [], "paused_queues": []}


def status_of(**counts):
    return {**STATUS, "tasks": COUNTS | counts, "idle": not any(counts.values())}


@pytest.fixture
def asking(monkeypatch, capsys, tmp_path):
    """Run a command against fake nodes: (exit code, document on standard output, text on standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONCEKEEPER_TOKEN", "t0ken")

    def ask(*arguments, nodes=()):
        if nodes:
            monkeypatch.setenv("ONCEKEEPER_CLUSTER", ",".join(node.url for node in nodes))
        else:
            monkeypatch.delenv("ONCEKEEPER_CLUSTER", raising=False)
        capsys.readouterr()
        code = run([*arguments, "--json"])
        said = capsys.readouterr()
        return code, json.loads(said.out), said.err

    return ask


def test_with_json_there_is_one_document_and_nothing_else(asking):
    with serving({"GET /v1/status": (200, STATUS)}) as node:
        assert asking("status", nodes=[node]) == (0, STATUS, "")
        assert node.asked[0].token == "Bearer t0ken"


def test_without_json_a_person_gets_a_table(asking, capsys):
    with serving({"GET /v1/status": (200, STATUS)}) as node:
        asking("status", nodes=[node])
        assert run(["status"]) == 0
    said = capsys.readouterr()
    assert "executed   1,234" in said.out
    assert "1 suspects wait for a human" in said.err


def test_no_cluster_at_all_is_unreachable(asking):
    code, document, _ = asking("status")
    assert code == 3
    assert "holds no cluster (no cluster.json)" in document["error"]


def test_a_cluster_whose_nodes_are_down_is_unreachable(asking, tmp_path):
    create(tmp_path / "oncekeeper-data", nodes=3, app="shop:app", app_dir=tmp_path)
    code, document, _ = asking("nodes")
    assert code == 3
    assert "no node of" in document["error"]


def test_a_directory_gives_the_token(asking, tmp_path):
    cluster = create(tmp_path / "oncekeeper-data", nodes=1, app="shop:app", app_dir=tmp_path, http_tls=False)
    with serving({"GET /v1/status": (200, STATUS)}) as node:
        path = cluster.dir / "cluster.json"
        path.write_text(path.read_text().replace(str(cluster.peers["n1"].http), f"127.0.0.1:{node.port}"))
        assert asking("status")[0] == 0
        assert node.asked[0].token == f"Bearer {http_token(read_secret(cluster.dir))}"


def test_nodes_are_tried_in_turn(asking):
    with (
        serving({"GET /v1/status": (503, {"error": "no quorum"})}) as lost,
        serving({"GET /v1/status": (200, STATUS)}) as well,
    ):
        assert asking("status", nodes=[lost, well])[0] == 0
        assert (len(lost.asked), len(well.asked)) == (1, 1)


def test_nodes_without_a_quorum_are_unreachable_and_say_so(asking):
    with serving({"GET /v1/status": (503, {"error": "no quorum"})}) as lost:
        code, document, _ = asking("status", nodes=[lost])
    assert code == 3
    assert "no quorum" in document["error"]


@pytest.mark.parametrize("verb", ["cancel", "retry"])
def test_several_tasks_are_steered_at_once_and_each_refusal_is_told(asking, verb):
    late = {"error": "it is executed already", "field": None, "outcome": "too late"}
    answers = {
        f"POST /v1/tasks/1/{verb}": (200, {"id": "1"}),
        f"POST /v1/tasks/2/{verb}": (409, late),
        f"POST /v1/tasks/3/{verb}": (200, {"id": "3"}),
    }
    with serving(answers) as node:
        code, document, said = asking("task", verb, "1", "2", "3", nodes=[node])
        assert asking("task", verb, "1", nodes=[node])[:2] == (0, {"id": "1"})
    assert code == 1
    assert [(each["id"], each.get("error")) for each in document] == [
        ("1", None), ("2", late["error"]), ("3", None),
    ]  # fmt: skip
    assert "2: it is executed already" in said


def test_a_refusal_is_a_failure_with_its_field(asking):
    refusal = {"error": "handler: 'shop.x' is not registered", "field": "handler"}
    answers = {"POST /v1/ids": (200, {"start": 5, "count": 1}), "POST /v1/tasks": (400, refusal)}
    with serving(answers) as node:
        code, document, _ = asking("submit", "shop.x", nodes=[node])
    assert (code, document["error"], document["field"]) == (1, refusal["error"], "handler")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frob"], "No such command 'frob'."),
        (["status", "--frob"], "No such option: --frob"),
        (["submit"], "handler is missing"),
        (["submit", "shop.x", "--body", "{"], "body={ is no JSON"),
        (["submit", "shop.x", "--body", "[1]"], "body=[1] must be a JSON object"),
        (
            ["submit", "shop.x", "--ttr", "-3s"],
            "ttr=-3s must be a duration above 0, as in 500ms, 30s, 5m or 1h",
        ),
        (["submit", "shop.x", "--ttr", "0"], "ttr=0 must be at least 1ms"),
        (["submit", "shop.x", "--count", "0"], "count=0 must be from 1 to"),
        (["submit", "shop.x", "--count", "2", "--key", "a"], "key=a names one task, so count=2 must be 1"),
        (["submit", "shop.x", "--file", "none.jsonl"], "file=none.jsonl: there is no such file"),
        (["why", "x1"], "id='x1' must be decimal digits, or 'k' and 32 hexadecimal digits"),
        (["task", "list", "--state", "odd"], "Invalid value for '--state'"),
        (["suspect", "rule", "1"], "say either --executed or --not-executed"),
        (["suspect", "rule", "--executed"], "name the suspects, or say --all"),
        (["suspect", "rule", "1", "--executed"], "reason is missing"),
        (["wait"], "--idle is missing"),
        (["demo", "--orders", "3"], "orders=3 must be from 100"),
        (["cluster", "up"], "app is missing"),
        (["cluster", "up", "--app", "shop"], "app='shop' must be MODULE:APP"),
    ],
)
def test_bad_usage_ends_with_2_and_names_what_is_wrong(asking, arguments, message):
    code, document, _ = asking(*arguments)
    assert code == 2
    assert document["error"].startswith(message)


def ids_and_tasks():
    """Answers of a node that numbers from 100 on and takes every task."""
    given = {"next": 100}

    def ids(asked):
        count = json.loads(asked.body)["count"]
        start, given["next"] = given["next"], given["next"] + count
        return 200, {"start": start, "count": count}

    def tasks(asked):
        messages = [json.loads(line) for line in asked.body.splitlines()]
        return 200, {"ids": [message.get("id", "k" + "0" * 32) for message in messages], "duplicates": 0}

    return {"POST /v1/ids": ids, "POST /v1/tasks": tasks}


def test_ids_are_fixed_before_the_tasks_are_sent(asking):
    with serving(ids_and_tasks()) as node:
        code, document, _ = asking("submit", "shop.x", "--body", '{"a":1}', "--count", "3", nodes=[node])
        sent = [json.loads(line) for line in node.asked[1].body.splitlines()]
    assert (code, document) == (0, {"ids": ["100", "101", "102"], "duplicates": 0})
    assert sent == [{"handler": "shop.x", "body": {"a": 1}, "id": str(number)} for number in (100, 101, 102)]


def test_what_got_no_answer_is_sent_again_under_the_same_ids(asking):
    unknown = (504, {"error": "may or may not be stored", "unknown": True})
    answers = ids_and_tasks()
    with serving(answers | {"POST /v1/tasks": unknown}) as first, serving(answers) as second:
        code, document, _ = asking("submit", "shop.x", nodes=[first, second])
        tries = [asked.body for node in (first, second) for asked in node.asked if asked.path == "/v1/tasks"]
    assert (code, document["ids"]) == (0, ["100"])
    assert len(tries) == 2
    assert tries[0] == tries[1]


def test_a_file_of_tasks_is_sent_line_by_line(asking, tmp_path):
    lines = [{"body": {"n": 1}, "key": "a"}, {"body": {"n": 2}, "handler": "shop.y"}]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    with serving(ids_and_tasks()) as node:
        code, document, _ = asking("submit", "shop.x", "--ttr", "30s", "--file", "tasks.jsonl", nodes=[node])
        sent = [json.loads(line) for line in node.asked[1].body.splitlines()]
    assert (code, len(document["ids"])) == (0, 2)
    assert sent == [
        {"handler": "shop.x", "ttr_ms": 30000, "body": {"n": 1}, "key": "a"},
        {"handler": "shop.y", "ttr_ms": 30000, "body": {"n": 2}, "id": "100"},
    ]


def test_a_bad_line_is_named_before_anything_is_submitted(asking, tmp_path):
    (tmp_path / "tasks.jsonl").write_text('{"body": {}}\n{"body": 1}\n')
    with serving(ids_and_tasks()) as node:
        code, document, _ = asking("submit", "shop.x", "--file", "tasks.jsonl", nodes=[node])
        assert node.asked == []
    assert code == 2
    assert document["error"].startswith("tasks.jsonl, line 2: body must be an object")


def test_waiting_ends_when_the_cluster_says_that_it_is_idle(asking):
    said = iter([status_of(waiting=2), status_of(running=1), status_of()])
    with serving({"GET /v1/status": lambda asked: (200, next(said))}) as node:
        code, document, _ = asking("wait", "--idle", nodes=[node])
    assert (code, document["idle"], document["tasks"]) == (0, True, COUNTS)


def test_waiting_in_vain_is_a_failure(asking):
    with serving({"GET /v1/status": (200, status_of(waiting=2))}) as node:
        code, document, _ = asking("wait", "--idle", "--timeout", "0", nodes=[node])
    assert code == 1
    assert document["error"] == "not idle after 0 s: 2 waiting"


def test_all_suspects_are_ruled_page_by_page(asking):
    def page(asked):
        first = "after" not in asked.path
        return 200, {"suspects": [{"id": "1"} if first else {"id": "2"}], "next": "1" if first else None}

    def ruled(asked):
        return 200, {"outcomes": [{"id": each, "outcome": "ruled"} for each in json.loads(asked.body)["ids"]]}

    with serving({"GET /v1/suspects": page, "POST /v1/suspects/rule": ruled}) as node:
        told = ["--not-executed", "--reason", "the bank says so", "--by", "ada"]
        code, document, _ = asking("suspect", "rule", "--all", *told, nodes=[node])
        asked = json.loads(node.asked[-1].body)
    assert (code, document["ruled"]) == (0, 2)
    assert asked == {"ids": ["1", "2"], "verdict": "not_executed", "by": "ada", "reason": "the bank says so"}


def test_a_ruling_that_misses_a_suspect_is_a_failure(asking):
    outcomes = [{"id": "1", "outcome": "ruled"}, {"id": "2", "outcome": "executed already"}]
    with serving({"POST /v1/suspects/rule": (200, {"ruled": 1, "outcomes": outcomes})}) as node:
        code, document, _ = asking("suspect", "rule", "1", "2", "--executed", "--reason", "r", nodes=[node])
    assert (code, document["ruled"], document["outcomes"]) == (1, 1, outcomes)


def test_a_stopped_cluster_goes_down_at_once(asking, tmp_path):
    cluster = create(tmp_path / "oncekeeper-data", nodes=3, app="shop:app", app_dir=tmp_path)
    code, document, _ = asking("cluster", "down")
    assert (code, document) == (0, {"dir": str(cluster.dir), "stopped": [], "killed": []})


def test_a_node_that_is_not_of_the_cluster_cannot_be_started(asking, tmp_path):
    create(tmp_path / "oncekeeper-data", nodes=2, app="shop:app", app_dir=tmp_path)
    code, document, _ = asking("cluster", "start", "n7")
    assert (code, document["error"]) == (2, "node=n7 is not one of n1, n2")


def test_a_configuration_is_shown_with_where_it_came_from(asking, tmp_path):
    create(tmp_path / "oncekeeper-data", nodes=2, app="shop:app", app_dir=tmp_path)
    code, document, _ = asking("config", "show", "--node", "n2", "--set", "io_threads=3")
    assert code == 0
    assert (document["config"]["node_id"], document["config"]["io_threads"]) == ("n2", 3)
    assert (document["origins"]["io_threads"], document["origins"]["app"]) == ("--set", "cluster.json")


def test_an_application_that_fails_to_import_stops_everything_before_it_starts(asking, tmp_path):
    (tmp_path / "broken.py").write_text("import no_such_module_anywhere\n")
    code, document, _ = asking("cluster", "up", "--app", "broken:app", "--detach")
    assert code == 1
    assert "app=broken:app cannot be loaded" in document["error"]
    assert "no_such_module_anywhere" in document["error"]
    assert not (tmp_path / "oncekeeper-data").exists()


def test_status_imports_none_of_what_it_does_not_need(tmp_path):
    """Start-up time is what a person feels; what costs it is imports."""
    heavy = ["aiohttp", "asyncio", "httpx", "sqlalchemy", "rich", "oncekeeper", "pysyncobj"]
    program = (
        "import sys; from node.cli.program import run; run(['status', '--json']);"
        f"print([name for name in {heavy} if name in sys.modules], file=sys.stderr)"
    )
    port = free_ports(1)[0]
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env={"ONCEKEEPER_CLUSTER": f"http://127.0.0.1:{port}", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stderr.strip().splitlines()[-1] == "[]"
