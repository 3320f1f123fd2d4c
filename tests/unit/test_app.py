"""App and task: declarations, arguments, and what a worker is given."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
from collections.abc import Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypedDict

import msgspec
import pytest

from oncekeeper import (
    App,
    ApplicationError,
    CurrentTask,
    InvalidHandler,
    InvalidTask,
    OncekeeperError,
    UnencodableResult,
    current_task,
    load_app,
)
from oncekeeper.arguments import Arguments
from oncekeeper.context import running_task
from oncekeeper.envelope import BODY_BYTES_MAX
from oncekeeper.handlers import RESULT_BYTES_MAX

TASK = CurrentTask(7, "shop.charge", 100, 2, "mail")


@pytest.fixture
def app() -> App:
    return App("shop")


class Line(TypedDict):
    sku: str
    count: int


@dataclasses.dataclass
class Address:
    city: str


class Opaque:
    pass


# --- declarations ---------------------------------------------------------------------------------------------


def test_a_decorated_function_stays_the_plain_function(app: App) -> None:
    @app.task
    def charge(order_id: int, cents: int = 5) -> str:
        """Charge."""
        return f"{order_id}:{cents}"

    assert charge(1) == "1:5"
    assert charge(1, cents=7) == "1:7"
    assert (vars(charge)["__name__"], charge.__doc__, charge.name) == ("charge", "Charge.", "shop.charge")


def test_an_async_function_stays_one(app: App) -> None:
    @app.task
    async def fetch(url: str) -> int:
        return len(url)

    assert asyncio.run(fetch("abc")) == 3
    assert fetch.handler.is_async


def test_the_safe_policy_is_the_default(app: App) -> None:
    @app.task
    def charge() -> None: ...

    assert charge.handler.info() == {
        "name": "shop.charge",
        "kind": "io",
        "length": "short",
        "is_async": False,
        "ttr_ms": 30_000,
        "retries": 5,
        "retry_delay_ms": 1000,
        "retry_delay_ms_max": 300_000,
        "on_doubt": "hold",
        "queue": "default",
        "schedule": "",
        "tz": "",
        "catch_up": "latest",
    }


def test_two_tasks_of_one_name_are_refused_with_both_places(app: App) -> None:
    @app.task
    def charge() -> None: ...

    with pytest.raises(
        InvalidHandler, match=r"shop\.charge is .*test_app\.py:\d+\) and .*test_app\.py:\d+\)"
    ):

        @app.task(name="charge")
        def other() -> None: ...


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ttr": -1}, "shop.f: ttr=-1 must be from 0.001 to 604800 seconds"),
        ({"ttr": float("nan")}, "ttr=nan must be"),
        ({"retries": -1}, "retries=-1 must be from 0 to 1000"),
        ({"retry_delay": 60, "retry_delay_max": 30}, "retry_delay_max=30 must be from 60"),
        ({"kind": "gpu"}, "kind='gpu' must be one of io, cpu"),
        ({"length": "huge"}, "length='huge' must be one of short, long"),
        ({"on_doubt": "pray"}, "on_doubt='pray' must be one of rerun, check, skip, hold"),
        ({"on_doubt": 5}, "on_doubt=5 must be one of"),
        ({"queue": "a b"}, "queue: must match"),
        ({"name": "a b"}, "handler: must match"),
    ],
)
def test_a_bad_option_is_named(app: App, options: dict[str, Any], text: str) -> None:
    def f() -> None: ...

    with pytest.raises(InvalidHandler) as caught:
        app.task(**options)(f)
    assert text in str(caught.value)
    assert not app.handlers


def test_an_async_handler_of_kind_cpu_is_refused(app: App) -> None:
    with pytest.raises(InvalidHandler, match='must be kind="io"'):

        @app.task(kind="cpu")
        async def f() -> None: ...


def test_a_bad_name_of_an_app_is_refused() -> None:
    with pytest.raises(InvalidHandler, match="App name: must match"):
        App("my shop")


# --- what a signature may be ----------------------------------------------------------------------------------


def test_star_arguments_are_refused(app: App) -> None:
    @app.task
    def many(*orders: int) -> None: ...

    @app.task
    def named(**orders: int) -> None: ...

    with pytest.raises(ApplicationError) as caught:
        app.verify()
    assert "shop.many: *orders: " in str(caught.value)
    assert "shop.named: **orders: " in str(caught.value)


def test_a_type_without_a_json_form_is_refused(app: App) -> None:
    @app.task
    def f(x: dict[str, list[Opaque]]) -> None: ...

    with pytest.raises(ApplicationError, match=r"shop\.f: x: .*Opaque has no JSON form"):
        app.verify()


def test_a_type_that_nobody_knows_is_refused(app: App) -> None:
    @app.task
    def f(x: "Unheard") -> None: ...  # type: ignore[name-defined]  # noqa: F821, UP037

    with pytest.raises(ApplicationError, match="'Unheard' is not defined"):
        app.verify()


def test_all_kinds_of_parameters_and_types_find_their_way_through_json(app: App) -> None:
    @app.task
    def f(  # type: ignore[no-untyped-def]
        a: int,
        /,
        b: Address,
        c: list[Line],
        when: datetime.datetime,
        *,
        d: float | None = None,
        e: set[str],
        tags: list[str] = ["x"],  # noqa: B006 - the point of the test
        anything: Any = None,
        plain="",
    ) -> None: ...

    when = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
    signature = f.handler.signature
    body = signature.encode(
        signature.bind((1, Address("Rome"), [{"sku": "s", "count": 2}], when), {"e": {"u"}})
    )
    decoded = f.handler.decode(body)
    assert decoded == Arguments(
        (1, Address("Rome"), [{"sku": "s", "count": 2}], when),
        {"d": None, "e": {"u"}, "tags": ["x"], "anything": None, "plain": ""},
    )
    f.handler.run(decoded)


def test_a_default_is_fresh_for_every_task(app: App) -> None:
    @app.task
    def f(tags: list[str] = ["x"]) -> None:  # noqa: B006
        tags.append("y")

    for _ in range(2):
        arguments = f.handler.decode(b"{}")
        assert arguments.args == (["x"],)
        f.handler.run(arguments)


# --- validation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((1, "5"), {}, "shop.charge: amount_cents: expected int, got str"),
        ((1,), {}, "shop.charge: arguments: missing a required argument: 'amount_cents'"),
        ((), {"order_id": 1}, "shop.charge: amount_cents: missing"),
        ((1, 2, 3, 4), {}, "shop.charge: arguments: too many positional arguments"),
        ((1,), {"order_id": 1}, "multiple values for argument 'order_id'"),
        ((), {"order_id": 1, "amount_cents": 2, "colour": 3}, "shop.charge: colour: unknown field"),
        (
            (1, 2),
            {"lines": [{"sku": "a", "count": "b"}]},
            "shop.charge: lines[0].count: expected int, got str",
        ),
        ((1, 2), {"lines": Opaque()}, "shop.charge: lines: has no JSON form"),
        ((1, 2), {"lines": [{"sku": "x" * BODY_BYTES_MAX, "count": 1}]}, "shop.charge: body: has"),
        ((1, float("nan")), {}, "shop.charge: amount_cents: expected int, got null"),
        (("\ud800", 2), {}, "shop.charge: order_id: "),
    ],
)
def test_arguments_that_do_not_fit_are_named_at_submit(
    app: App, args: tuple[Any, ...], kwargs: dict[str, Any], text: str
) -> None:
    @app.task
    def charge(order_id: int, amount_cents: int, lines: list[Line] | None = None) -> None: ...

    with pytest.raises(InvalidTask) as caught:
        charge.submit(*args, **kwargs)
    assert text in str(caught.value)


def test_bulk_errors_name_the_item(app: App) -> None:
    @app.task
    def charge(order_id: int, cents: int = 0) -> None: ...

    good: list[Any] = [{"order_id": n} for n in range(5000)]
    bads: list[tuple[Any, str]] = [
        ({"order_id": "x"}, "shop.charge: task 5000: order_id: expected int, got str"),
        ({"cents": 1}, "shop.charge: task 5000: order_id: missing"),
        ((1, 2, 3), "shop.charge: task 5000: arguments: too many positional"),
        (7, "shop.charge: task 5000: must be a mapping of arguments or a tuple"),
        ({"order_id": Opaque()}, "shop.charge: task 5000: order_id: has no JSON form"),
    ]
    for bad, text in bads:
        with pytest.raises(InvalidTask) as caught:
            charge.submit_many([*good, bad])
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"order_id": "1"}', "shop.charge: order_id: expected int, got str"),
        (b"{}", "shop.charge: order_id: missing"),
        (b'{"order_id": 1, "x": 2}', "shop.charge: x: unknown field"),
        (b"[1]", "shop.charge: body: expected object, got array"),
        (b"{", "shop.charge: body: "),
        (b"\xff", "shop.charge: body: "),
        (b'{"order_id": ' + b"[" * 50_000, "shop.charge: "),
    ],
)
def test_a_body_that_does_not_fit_is_refused_in_the_worker(app: App, body: bytes, text: str) -> None:
    @app.task
    def charge(order_id: int) -> None: ...

    with pytest.raises(InvalidTask) as caught:
        charge.handler.decode(body)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("options", "field"),
    [({"ttr": -1}, "ttr"), ({"ttr": 10**9}, "ttr_ms"), ({"key": ""}, "key"), ({"queue": "a b"}, "queue")],
)
def test_a_bad_submit_option_is_named(app: App, options: dict[str, Any], field: str) -> None:
    @app.task
    def charge(order_id: int) -> None: ...

    with pytest.raises(InvalidTask, match=rf"shop\.charge: {field}: "):
        charge.options(**options)


def test_one_key_for_many_tasks_is_refused(app: App) -> None:
    @app.task
    def charge(order_id: int) -> None: ...

    with pytest.raises(InvalidTask, match="one key for many tasks"):
        charge.options(key="k").submit_many([{"order_id": 1}])


# --- results and context --------------------------------------------------------------------------------------


def test_results_become_json_or_say_why_not(app: App) -> None:
    @app.task
    def charge() -> Address:
        return Address("Rome")

    handler = charge.handler
    assert handler.encode_result(charge()) == b'{"city":"Rome"}'
    assert handler.encode_result(None) == b"null"
    assert handler.signature.decode_result({"city": "Rome"}) == Address("Rome")
    assert handler.signature.decode_result({"town": "Rome"}) == {"town": "Rome"}
    with pytest.raises(UnencodableResult, match=r"shop\.charge: the result has no JSON form: .*Opaque"):
        handler.encode_result([Opaque()])
    with pytest.raises(UnencodableResult, match=f"has {RESULT_BYTES_MAX + 1} bytes, the most is"):
        handler.encode_result("x" * (RESULT_BYTES_MAX - 1))


def test_the_current_task_is_known_while_it_runs_and_only_then(app: App) -> None:
    @app.task
    def charge() -> tuple[str, int, int, str]:
        task = current_task()
        return task.id_text, task.fence, task.attempt, task.queue

    with charge.handler.running(TASK):
        assert charge.handler.run(charge.handler.decode(b"{}")) == ("7", 100, 2, "mail")
    assert running_task() is None
    with pytest.raises(OncekeeperError, match="only while a worker runs a handler"):
        current_task()


# --- checks ---------------------------------------------------------------------------------------------------


def test_a_check_function_is_asked_with_the_arguments_of_the_task(app: App) -> None:
    asked: list[tuple[int, str, int]] = []

    @app.task(on_doubt="check")
    def send(order_id: int, *, to: str = "me") -> None: ...

    @send.check
    def was_sent(order_id: int, *, to: str = "me") -> bool | None:
        asked.append((order_id, to, task.fence if (task := running_task()) else 0))
        return {1: True, 2: False}.get(order_id)

    app.verify()
    handler = send.handler
    answers = [handler.check(TASK, handler.decode(b'{"order_id": %d}' % n)) for n in (1, 2, 3)]
    assert answers == [True, False, None]
    assert asked == [(1, "me", 100), (2, "me", 100), (3, "me", 100)]
    assert was_sent(1) is True  # and it stays a plain function


def test_a_check_may_be_async(app: App) -> None:
    @app.task(on_doubt="check")
    async def send(order_id: int) -> None: ...

    @send.check
    async def was_sent(order_id: int) -> bool:
        return True

    assert send.handler.check(TASK, send.handler.decode(b'{"order_id": 1}')) is True


def test_a_check_must_answer_true_false_or_none(app: App) -> None:
    @app.task(on_doubt="check")
    def send() -> None: ...

    @send.check
    def was_sent() -> Any:
        return "yes"

    with pytest.raises(TypeError, match="must answer True, False or None, not 'yes'"):
        send.handler.check(TASK, send.handler.decode(b"{}"))


def test_a_task_that_wants_a_check_and_has_none_is_refused(app: App) -> None:
    @app.task(on_doubt="check")
    def send() -> None: ...

    with pytest.raises(ApplicationError, match=r"decorate a function with @send\.check"):
        app.verify()


def test_a_check_of_another_signature_is_refused(app: App) -> None:
    @app.task(on_doubt="check")
    def send(order_id: int) -> None: ...

    @send.check  # type: ignore[arg-type]
    def was_sent(order: int, to: str) -> bool:
        return True

    with pytest.raises(ApplicationError, match=r"check must take the same arguments \(order_id\)"):
        app.verify()


def test_a_check_that_would_never_be_asked_is_refused(app: App) -> None:
    @app.task
    def send() -> None: ...

    with pytest.raises(InvalidHandler, match='never asked with on_doubt="hold"'):
        send.check(lambda: True)


def test_a_strategy_of_ones_own_records_and_checks(app: App) -> None:
    class Notes:
        def __init__(self) -> None:
            self.seen: list[object] = []

        def recording(self, task: CurrentTask) -> AbstractContextManager[object]:
            @contextmanager
            def note() -> Any:
                self.seen.append(("run", task.id))
                yield

            return note()

        def took_effect(self, task: CurrentTask, arguments: Mapping[str, Any]) -> bool | None:
            self.seen.append(("check", dict(arguments)))
            return True

    notes = Notes()

    @app.task(on_doubt=notes)
    def send(order_id: int, *, to: str = "me") -> None: ...

    app.verify()
    arguments = send.handler.decode(b'{"order_id": 1}')
    with send.handler.running(TASK):
        send.handler.run(arguments)
    assert send.handler.on_doubt == "check"
    assert send.handler.check(TASK, arguments) is True
    assert notes.seen == [("run", 7), ("check", {"order_id": 1, "to": "me"})]


# --- loading --------------------------------------------------------------------------------------------------


def module(directory: Path, name: str, text: str) -> str:
    (directory / f"{name}.py").write_text(text)
    return name


SHOP = "from oncekeeper import App\nshop = App('shop')\n@shop.task\ndef charge(order_id: int) -> None: ...\n"


def test_an_application_is_loaded_from_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    name = module(tmp_path, "shop_that_loads", SHOP)
    assert list(load_app(f"{name}:shop", tmp_path).handlers) == ["shop.charge"]


@pytest.mark.parametrize(
    ("name", "text", "attribute", "said"),
    [
        (
            "bad_import",
            "import no_such_module_here",
            "app",
            "importing bad_import .* ModuleNotFoundError: No module",
        ),
        ("bad_syntax", "def", "app", "importing bad_syntax .* SyntaxError"),
        ("bad_exit", "raise SystemExit(3)", "app", "importing bad_exit .* SystemExit: 3"),
        ("bad_name", SHOP, "app", "has no App named 'app' .*; it has shop"),
        ("bad_type", "app = 5", "app", r"has no App named 'app' \(found int\)"),
        ("bad_empty", "from oncekeeper import App\napp = App('x')", "app", "x has no tasks"),
        ("bad_args", SHOP + "@shop.task\ndef f(*x: int) -> None: ...\n", "shop", r"shop\.f: \*x"),
    ],
)
def test_an_application_that_cannot_be_loaded_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, attribute: str, said: str
) -> None:
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    module(tmp_path, name, text)
    with pytest.raises(ApplicationError, match=said):
        load_app(f"{name}:{attribute}", tmp_path)


@pytest.mark.parametrize("target", ["shop", ":app", "shop:", ""])
def test_a_target_that_names_no_app_is_refused(target: str) -> None:
    with pytest.raises(ApplicationError, match="must be MODULE:NAME"):
        load_app(target)


def test_a_directory_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ApplicationError, match="nowhere does not exist"):
        load_app("a:b", tmp_path / "nowhere")


def test_what_is_encoded_is_plain_json(app: App) -> None:
    @app.task
    def charge(order_id: int, at: datetime.date) -> None: ...

    body = charge.handler.signature.encode({"order_id": 1, "at": datetime.date(2026, 1, 2)})
    assert msgspec.json.decode(body) == {"order_id": 1, "at": "2026-01-02"}
