"""The client against a real log file, real sockets, and nodes that answer from a script."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from dedup.ids import Ids, TaskId, keyed_id
from oncekeeper import (
    App,
    Client,
    ClusterUnreachable,
    Handle,
    InvalidTask,
    LogUnusable,
    NoCluster,
    Refused,
    ResultLost,
    ResultTimeout,
    SubmitFailed,
    TaskCancelled,
    TaskFailed,
    UnknownSubmit,
    UnknownTask,
)
from oncekeeper.cluster import find_cluster
from oncekeeper.log.embedded import open_log
from oncekeeper.log.port import Fetched
from tests.support.log_cluster import TOKEN, Answer, Route, ScriptedNode, closed_port, data_directory, working

Start = Callable[[Route], ScriptedNode]


@pytest.fixture
def start() -> Iterator[Start]:
    nodes: list[ScriptedNode] = []

    def make(route: Route) -> ScriptedNode:
        nodes.append(ScriptedNode(route))
        return nodes[-1]

    yield make
    for node in nodes:
        node.close()


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONCEKEEPER_TOKEN", TOKEN)


def stored(directory: Path) -> dict[TaskId, bytes]:
    log = open_log(directory)
    found: dict[TaskId, bytes] = {}
    for partition in range(log.partitions):
        for fetched in log.read(partition, 0, 10**6, 10**9):
            assert isinstance(fetched, Fetched)
            found.update(zip(fetched.batch.ids, fetched.batch.bodies, strict=True))
    log.close()
    return found


def shop(cluster: object) -> App:
    app = App("shop", cluster=str(cluster))

    @app.task(queue="mail")
    def charge(order_id: int, cents: int = 5) -> str:
        return ""

    return app


def submitter(app: App) -> Any:
    """The task of ``app`` that ``shop`` declared."""
    from oncekeeper.app import SyncTask

    return SyncTask(app, app.handlers["shop.charge"])


# --- on the machine of the cluster ----------------------------------------------------------------------------


def test_a_submit_is_in_the_log_when_it_returns_and_wakes_the_nodes(tmp_path: Path, start: Start) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as wake:
        wake.bind(("127.0.0.1", 0))
        wake.settimeout(10)
        directory = data_directory(tmp_path / "d", [start(working).address], [wake.getsockname()[1]])
        handle = submitter(shop(directory)).submit(1, cents=7)
        assert stored(directory) == {1: b'{"order_id":1,"cents":7}'}
        assert handle.id == "1"
        named = wake.recv(10)
    log = open_log(directory)
    (found,) = log.find(1)
    assert named == found.partition.to_bytes(2, "little"), "the nodes need not look at the other partitions"
    assert (found.batch.handler, found.batch.queue) == ("shop.charge", "mail")
    assert found.batch.submitted_by
    assert found.batch.submitted_ms > 1_700_000_000_000
    log.close()


def test_submitting_survives_with_all_nodes_down(tmp_path: Path) -> None:
    directory = data_directory(tmp_path / "d", [f"127.0.0.1:{closed_port()}"], [closed_port()])
    handle = submitter(shop(directory)).submit(1)
    assert handle.id.startswith("k")
    assert list(stored(directory)) == [handle.task_id]


def test_many_tasks_make_a_lazy_sequence_of_handles_in_their_order(tmp_path: Path, start: Start) -> None:
    directory = data_directory(tmp_path / "d", [start(working).address])
    handles = submitter(shop(directory)).submit_many({"order_id": n} for n in range(70_000))
    assert len(handles) == 70_000
    assert [handle.id for handle in handles[69_998:]] == [handles[69_998].id, handles[-1].id]
    assert [int(handle.id) for handle in handles] == sorted(int(handle.id) for handle in handles)
    found = stored(directory)
    assert len(found) == 70_000
    for at in (0, 1, 65_535, 65_536, 69_999):
        assert found[handles[at].task_id] == b'{"order_id":%d}' % at
    with pytest.raises(IndexError):
        handles[70_000]


def test_a_bad_item_of_a_sequence_stores_nothing(tmp_path: Path, start: Start) -> None:
    directory = data_directory(tmp_path / "d", [start(working).address])
    with pytest.raises(InvalidTask, match="task 69999: order_id: expected int, got str"):
        submitter(shop(directory)).submit_many([{"order_id": n} for n in range(69_999)] + [{"order_id": "x"}])
    assert stored(directory) == {}


def test_equal_keys_make_equal_ids_within_a_queue(tmp_path: Path, start: Start) -> None:
    directory = data_directory(tmp_path / "d", [start(working).address])
    charge = submitter(shop(directory))
    one, two = (charge.options(key="order-1").submit(1) for _ in range(2))
    assert one == two
    assert one.task_id == keyed_id("mail", "order-1")
    assert charge.options(key="order-1", queue="other").submit(1) != one
    handles = charge.submit_many([(1,), (2,)], keys=["order-1", "order-2"])
    assert [handle.task_id for handle in handles] == [keyed_id("mail", f"order-{n}") for n in (1, 2)]
    with pytest.raises(InvalidTask, match="keys: are fewer than the tasks"):
        charge.submit_many([(1,), (2,)], keys=["order-1"])


def test_options_travel_with_the_task(tmp_path: Path, start: Start) -> None:
    directory = data_directory(tmp_path / "d", [start(working).address])
    submitter(shop(directory)).options(ttr=2.5, queue="slow").submit(1)
    log = open_log(directory)
    (found,) = log.find(1)
    log.close()
    assert (found.batch.ttr_ms, found.batch.queue) == (2500, "slow")


def test_submit_async_leaves_the_loop_alone(tmp_path: Path, start: Start) -> None:
    directory = data_directory(tmp_path / "d", [start(working).address])
    charge = submitter(shop(directory))

    async def use() -> list[str]:
        handles = await asyncio.gather(*(charge.submit_async(n) for n in range(20)))
        return [handle.id for handle in handles]

    assert sorted(map(int, asyncio.run(use()))) == list(range(1, 21))


def test_a_full_disk_is_submit_failed_and_stores_nothing(tmp_path: Path, start: Start) -> None:
    directory = data_directory(tmp_path / "d", [start(working).address])
    client = Client(directory)
    client.send("shop.charge", [b"{}"])
    assert client._log is not None
    client._log._database.execute("PRAGMA max_page_count = 20")
    with pytest.raises(SubmitFailed, match=r"nothing was stored: .*tasks\.db: database or disk is full"):
        client.send("shop.charge", [b'{"x": "' + b"y" * 200_000 + b'"}'])
    assert list(stored(directory)) == [1]


def _in_child(client: Client, results: Any) -> None:
    results.put(list(client.send("shop.charge", [b"{}"] * 3)))


def test_a_forked_child_takes_no_id_of_its_parent(tmp_path: Path, start: Start) -> None:
    directory = data_directory(tmp_path / "d", [start(working).address])
    client = Client(directory)
    mine = list(client.send("shop.charge", [b"{}"]))
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(client, results))
    child.start()
    theirs = results.get()
    child.join()
    mine += list(client.send("shop.charge", [b"{}"]))
    assert len({*mine, *theirs}) == 5
    assert set(stored(directory)) == {*mine, *theirs}


def test_a_publisher_imports_nothing_of_the_node() -> None:
    others = ("node", "raft", "httpx", "sqlalchemy")
    code = f"import oncekeeper, sys; print([m for m in sys.modules if m.split('.')[0] in {others}])"
    root = Path(__file__).parents[2]
    assert subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True).strip() == "[]"


# --- by addresses ---------------------------------------------------------------------------------------------


def test_tasks_are_sent_to_a_node(start: Start, token: None) -> None:
    node = start(working)
    handles = submitter(shop(node.url)).submit_many([{"order_id": n} for n in range(4500)])
    assert [task["id"] for task in node.tasks] == [handle.id for handle in handles]
    assert node.tasks[3]["body"] == {"order_id": 3}
    assert node.calls.count(("POST", "/v1/tasks")) == 3


def test_the_next_address_is_tried(start: Start, token: None) -> None:
    def sick(node: ScriptedNode, call: str, body: bytes, query: Mapping[str, str]) -> Answer | None:
        return 503, {"error": "no leader", "field": None}

    dead, ill, well = f"http://127.0.0.1:{closed_port()}", start(sick), start(working)
    client = Client(f"{dead},{ill.url},{well.url}")
    client.submit("shop.charge", {"order_id": 1})
    calls = len(ill.calls)
    client.submit("shop.charge", {"order_id": 2})
    assert len(well.tasks) == 2
    assert len(ill.calls) == calls  # the address that answered is the first to be asked


def test_a_lost_answer_is_unknown_and_the_same_ids_may_be_sent_again(start: Start, token: None) -> None:
    silent = True

    def route(node: ScriptedNode, call: str, body: bytes, query: Mapping[str, str]) -> Answer | None:
        answer = working(node, call, body, query)
        return None if silent and call == "POST /v1/tasks" else answer

    node = start(route)
    client = Client(node.url)
    with pytest.raises(UnknownSubmit, match="sending the same ids again is safe") as caught:
        client.send("shop.charge", [b"{}", b"{}"])
    silent = False
    assert isinstance(caught.value.ids, Ids)
    assert client.send("shop.charge", [b"{}", b"{}"], ids=caught.value.ids) == caught.value.ids
    assert [task["id"] for task in node.tasks] == ["1", "2", "1", "2"]


def test_a_refusal_names_the_field(start: Start, token: None) -> None:
    def route(node: ScriptedNode, call: str, body: bytes, query: Mapping[str, str]) -> Answer | None:
        if call == "POST /v1/tasks":
            return 400, {"error": "handler: 'shop.none' is not registered", "field": "handler"}
        return working(node, call, body, query)

    with pytest.raises(InvalidTask) as caught:
        Client(start(route).url).submit("shop.none", {})
    assert caught.value.field == "handler"
    assert str(caught.value).count("handler") == 1


def test_an_unreachable_cluster_says_which_addresses_were_tried(token: None) -> None:
    ports = [closed_port(), closed_port()]
    client = Client(",".join(f"http://127.0.0.1:{port}" for port in ports))
    with pytest.raises(ClusterUnreachable) as caught:
        client.submit("shop.charge", {})
    assert all(str(port) in str(caught.value) for port in ports)
    assert not caught.value.maybe


def test_a_wrong_token_is_refused(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONCEKEEPER_TOKEN", "wrong")
    with pytest.raises(Refused, match="a token is wanted") as caught:
        Client(start(working).url).task(1)
    assert caught.value.status == 401


# --- asking about tasks ---------------------------------------------------------------------------------------


def answering(*answers: Answer) -> tuple[Route, list[str]]:
    left, seen = list(answers), []

    def route(node: ScriptedNode, call: str, body: bytes, query: Mapping[str, str]) -> Answer | None:
        seen.append(call)
        return left.pop(0) if len(left) > 1 else left[0]

    return route, seen


def test_a_handle_asks_the_cluster(start: Start, token: None) -> None:
    route, seen = answering(
        (200, {"id": "7", "state": "waiting"}),
        (200, {"state": "cancelled"}),
        (200, {"state": "waiting"}),
        (200, {"story": []}),
    )
    handle = Client(start(route).url).handle(7)
    assert (handle.status(), handle.cancel(), handle.retry(), handle.why()) == (
        "waiting",
        "cancelled",
        "waiting",
        {"story": []},
    )
    assert seen == [
        "GET /v1/tasks/7",
        "POST /v1/tasks/7/cancel",
        "POST /v1/tasks/7/retry",
        "GET /v1/tasks/7/why",
    ]


def test_a_result_is_waited_for(start: Start, token: None) -> None:
    route, seen = answering(
        (200, {"id": "7", "state": "running"}), (200, {"id": "7", "state": "executed", "result": {"a": [1]}})
    )
    assert Client(start(route).url).handle(7).result(timeout=30) == {"a": [1]}
    assert len(seen) == 2


def test_a_result_waits_through_an_election(start: Start, token: None) -> None:
    route, _ = answering(
        (503, {"error": "no leader", "field": None}), (200, {"id": "7", "state": "executed", "result": 1})
    )
    assert Client(start(route).url).handle(7).result(timeout=30) == 1


def test_a_result_whose_node_is_starting_again_is_waited_for(start: Start, token: None) -> None:
    route, seen = answering(
        (200, {"id": "7", "state": "executed", "result": None, "known": False, "unreachable": ["n2"]}),
        (200, {"id": "7", "state": "executed", "result": 5, "known": True}),
    )
    assert Client(start(route).url).handle(7).result(timeout=30) == 5
    assert len(seen) == 2


def test_a_result_that_nobody_recorded_is_told_apart_from_none(start: Start, token: None) -> None:
    lost: dict[str, Any] = {
        "state": "executed",
        "result": None,
        "known": False,
        "unreachable": [],
        "note": "it is gone",
    }
    node = start(answering((200, lost))[0])
    with pytest.raises(ResultLost, match="task 7 took effect; its result is lost: it is gone"):
        Client(node.url).handle(7).result(timeout=30)
    assert Client(node.url).handle(7).result(timeout=30, default="lost") == "lost"

    app = App("shop", cluster=node.url)

    @app.task
    def tidy() -> None: ...

    # What returns nothing loses nothing.
    assert Handle[None](app.client, 7, app.handlers["shop.tidy"].signature).result() is None


def test_a_task_submitted_by_name_goes_to_its_handlers_own_queue(tmp_path: Path, start: Start) -> None:
    node = start(working)
    client = Client(data_directory(tmp_path / "d", [node.address]))
    assert client.submit("shop.charge", {}, key="k").task_id == keyed_id("mail", "k")
    assert client.submit("shop.charge", {}, key="k", queue="other").task_id == keyed_id("other", "k")
    (two,) = client.submit_many("shop.charge", [{}], keys=["k"])
    assert two.task_id == keyed_id("mail", "k")
    assert node.calls.count(("GET", "/v1/handlers")) == 1
    with pytest.raises(InvalidTask, match=r"'shop\.none' is not registered; the application has: shop"):
        client.submit("shop.none", {})


def test_a_queue_is_not_guessed_while_no_node_can_be_asked(tmp_path: Path) -> None:
    directory = data_directory(tmp_path / "d", [f"127.0.0.1:{closed_port()}"], [closed_port()])
    with pytest.raises(ClusterUnreachable):
        Client(directory).submit("shop.charge", {}, key="k")
    Client(directory).submit("shop.charge", {}, key="k", queue="mail")
    assert list(stored(directory)) == [keyed_id("mail", "k")]


@pytest.mark.parametrize(
    ("answer", "kind", "text"),
    [
        ((200, {"state": "dead", "error": "ValueError: no"}), TaskFailed, "task 7 is dead: ValueError: no"),
        ((200, {"state": "cancelled"}), TaskCancelled, "task 7 was cancelled"),
        ((200, {"state": "suspect"}), ResultTimeout, "task 7 is suspect after 0"),
        ((404, {"error": "no task 7", "field": "id"}), UnknownTask, "no task 7"),
        ((200, b"[1]"), Refused, "no JSON object"),
    ],
)
def test_a_task_without_a_result_raises(
    start: Start, token: None, answer: Answer, kind: type[Exception], text: str
) -> None:
    route, _ = answering(answer)
    with pytest.raises(kind, match=text):
        Client(start(route).url).handle(7).result(timeout=0)


# --- finding the cluster --------------------------------------------------------------------------------------


def test_the_cluster_is_found_by_argument_then_environment_then_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, default = (
        data_directory(tmp_path / name, ["127.0.0.1:1"]) for name in ("a", "b", "oncekeeper-data")
    )
    monkeypatch.chdir(tmp_path)
    assert find_cluster(one, {"ONCEKEEPER_CLUSTER": str(two)}).directory == one
    assert find_cluster(None, {"ONCEKEEPER_CLUSTER": str(two)}).directory == two
    assert find_cluster(None, {}).directory == default
    found = find_cluster("http://a:1, http://b:2/", {"ONCEKEEPER_TOKEN": "t"})
    assert (found.urls, found.token, found.directory) == (("http://a:1", "http://b:2"), "t", None)


@pytest.mark.parametrize("text", ["http://a", "http://a:x", "https://:1", "http://a:1,b:2", "http://a:99999"])
def test_an_address_that_is_none_is_named(text: str) -> None:
    with pytest.raises(NoCluster, match="must be http://HOST:PORT"):
        find_cluster(text, {"ONCEKEEPER_TOKEN": "t"})


def test_addresses_need_a_token() -> None:
    with pytest.raises(NoCluster, match="must stand in ONCEKEEPER_TOKEN"):
        find_cluster("http://a:1", {})


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("cluster.json", None, r"cluster\.json does not exist: name a cluster .* or make one with"),
        ("cluster.json", "{", r"cluster\.json: "),
        ("cluster.json", '{"format": 2}', r"cluster\.json: format is 2, this version reads 1"),
        ("cluster.json", "{}", "format is no number"),
        ("cluster.json", '{"format": 1, "cluster_id": "c", "nodes": {"n1": {}}}', "missing required field"),
        ("secret", None, "secret does not exist"),
        ("secret", "xyz", "must hold 32 bytes in hexadecimal digits"),
        ("secret", "ab", "must hold 32 bytes"),
    ],
)
def test_a_directory_that_is_no_cluster_says_why(
    tmp_path: Path, name: str, content: str | None, text: str
) -> None:
    directory = data_directory(tmp_path / "d", ["127.0.0.1:1"])
    if content is None:
        (directory / name).unlink()
    else:
        (directory / name).write_text(content)
    with pytest.raises(NoCluster, match=text):
        Client(directory)


def test_a_log_of_another_cluster_is_refused(tmp_path: Path) -> None:
    directory = data_directory(tmp_path / "d", [f"127.0.0.1:{closed_port()}"])
    described = json.loads((directory / "cluster.json").read_text())
    (directory / "cluster.json").write_text(json.dumps({**described, "cluster_id": "other"}))
    with pytest.raises(LogUnusable, match=r"belongs to cluster c+, not to other"):
        Client(directory).submit("shop.charge", {}, queue="mail")
