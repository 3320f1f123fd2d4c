"""From a handler's signature to the JSON body of its tasks, and back.

The signature becomes one msgspec struct. A submitter encodes the arguments and decodes them at once with that
struct, and throws the outcome away: whatever passes is what the worker will decode, by the same code.
"""

from __future__ import annotations

import copy
import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from oncekeeper.envelope import BODY_BYTES_MAX, UNDECODABLE, check_body, explain
from oncekeeper.errors import InvalidHandler, InvalidTask

_UNENCODABLE = (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError)
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

encode_json = msgspec.json.Encoder().encode


class Arguments(NamedTuple):
    """What a function is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Signature:
    """The arguments of one handler. Raises InvalidHandler for a function that cannot be one."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._name = name
        self._signature = inspect.signature(function)
        for parameter in self._signature.parameters.values():
            if parameter.kind in _VARIADIC:
                stars = "*" if parameter.kind is inspect.Parameter.VAR_POSITIONAL else "**"
                raise InvalidHandler(
                    f"{name}: {stars}{parameter.name}: a task's arguments must have names and types of their own"
                )
        self._names = tuple(self._signature.parameters)
        self._positional = sum(
            parameter.kind is not inspect.Parameter.KEYWORD_ONLY
            for parameter in self._signature.parameters.values()
        )
        try:
            hints = typing.get_type_hints(function, include_extras=True)
        except NameError as error:
            raise InvalidHandler(
                f"{name}: a type hint cannot be resolved: {error}. It must be known in the handler's module "
                "when the application is complete"
            ) from error
        self._result_type = hints.pop("return", Any)
        self._struct = self._define(hints)
        self._decode = msgspec.json.Decoder(self._struct).decode
        self._decode_many = msgspec.json.Decoder(list[self._struct]).decode  # type: ignore[name-defined]
        self._values = msgspec.structs.astuple

    def _define(self, hints: Mapping[str, Any]) -> type[msgspec.Struct]:
        fields: list[tuple[str, Any, Any]] = []
        for parameter in self._signature.parameters.values():
            hint = hints.get(parameter.name, Any)
            _check_type(self._name, parameter.name, hint)
            default = parameter.default
            if default is inspect.Parameter.empty:
                field = msgspec.field()
            elif isinstance(default, (str, int, float, bytes, tuple, frozenset, type(None))):
                field = msgspec.field(default=default)
            else:
                # A fresh copy a task: what one task does to a default must not be seen by the next.
                field = msgspec.field(default_factory=functools.partial(copy.deepcopy, default))
            fields.append((parameter.name, hint, field))
        # kw_only: a default may come before a field without one.
        return msgspec.defstruct("Arguments", fields, kw_only=True, forbid_unknown_fields=True)

    # --- submitting -------------------------------------------------------------------------------------------

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any], where: str = "") -> dict[str, Any]:
        """The arguments by name, as a call would bind them; those left to their defaults are left out."""
        if not args:
            return dict(kwargs)  # what is missing or unknown, validation finds
        try:
            return dict(self._signature.bind(*args, **kwargs).arguments)
        except TypeError as error:
            raise InvalidTask("arguments", str(error), self._where(where)) from None

    def encode(self, values: Mapping[str, Any]) -> bytes:
        """The body for these arguments, or InvalidTask naming the argument and what is wrong with it."""
        body = self._encode(values, "")
        self._validate(body, "")
        return body

    def encode_many(self, items: Iterable[object], at: int) -> list[bytes]:
        """Bodies for many tasks, each a mapping of arguments or a tuple of positional ones.

        ``at`` is the number of the first one; errors say which item it was.
        """
        try:
            bodies = [
                encode_json(item if type(item) is dict else self._item(item, at + number))
                for number, item in enumerate(items)
            ]
            if bodies:
                self._decode_many(b"[%b]" % b",".join(bodies))
        except _UNENCODABLE:
            items = list(items)
        else:
            if max(map(len, bodies), default=0) <= BODY_BYTES_MAX:
                return bodies
        # Something is wrong: once more, one by one, to find what.
        bodies = []
        for number, item in enumerate(items):
            where = f"task {at + number}"
            body = self._encode(self._item(item, at + number), where)
            self._validate(body, where)
            bodies.append(body)
        return bodies

    def _item(self, item: object, number: int) -> dict[str, Any]:
        if isinstance(item, Mapping):
            return dict(item)
        if isinstance(item, (tuple, list)):
            return self.bind(item, {}, f"task {number}")
        raise InvalidTask(
            f"task {number}",
            f"must be a mapping of arguments or a tuple of positional ones, not {type(item).__name__}",
            self._name,
        )

    def _encode(self, values: Mapping[str, Any], where: str) -> bytes:
        try:
            return encode_json(values)
        except _UNENCODABLE as error:
            for name, value in values.items():
                try:
                    encode_json(value)
                except _UNENCODABLE as cause:
                    raise InvalidTask(
                        str(name), f"has no JSON form: {cause}".replace("`", ""), self._where(where)
                    ) from None
            raise InvalidTask("arguments", f"have no JSON form: {error}", self._where(where)) from None

    def _validate(self, body: bytes, where: str) -> None:
        try:
            self.decode(body)
            check_body(body)
        except InvalidTask as error:
            raise InvalidTask(error.field, error.rule, self._where(where)) from None

    def _where(self, where: str) -> str:
        return f"{self._name}: {where}" if where else self._name

    # --- running ----------------------------------------------------------------------------------------------

    def decode(self, body: bytes) -> Arguments:
        """What to call the handler with. Raises InvalidTask if the body does not fit the handler's types."""
        try:
            values = self._values(self._decode(body))
        except UNDECODABLE as error:
            raise InvalidTask(*explain(error, "body"), self._name) from None
        if self._positional == len(values):
            return Arguments(values, {})
        return Arguments(
            values[: self._positional],
            dict(zip(self._names[self._positional :], values[self._positional :], strict=True)),
        )

    def verify_check(self, check: Callable[..., Any]) -> None:
        """Raise InvalidHandler unless ``check`` can be called with the handler's arguments."""
        self._verify_other(check, "check")

    def verify_delayed(self, function: Callable[..., Any]) -> None:
        """Raise InvalidHandler unless ``function`` can be called in the handler's stead."""
        self._verify_other(function, "function for delayed tasks")

    def _verify_other(self, check: Callable[..., Any], what: str) -> None:
        try:
            inspect.signature(check).bind(
                *self._names[: self._positional], **dict.fromkeys(self._names[self._positional :])
            )
        except TypeError as error:
            raise InvalidHandler(
                f"{self._name}: its {what} must take the same arguments ({', '.join(self._names)}): {error}"
            ) from None

    def by_name(self, arguments: Arguments) -> dict[str, Any]:
        """The same arguments, all by name."""
        return dict(zip(self._names, arguments.args, strict=False)) | arguments.kwargs

    @property
    def returns_nothing(self) -> bool:
        """Whether the handler says that it returns None, so that its result is known beforehand."""
        return self._result_type is type(None)

    def decode_result(self, result: Any) -> Any:
        """A plain JSON value as the type that the handler says it returns; as it is if it does not fit."""
        try:
            return msgspec.convert(result, self._result_type, strict=False)
        except (TypeError, msgspec.MsgspecError):
            return result


def _check_type(name: str, field: str, hint: Any) -> None:
    """Refuse a type that JSON cannot carry at declaration, not when the first task arrives."""
    try:
        kinds = msgspec.inspect.type_info(hint)
    except TypeError as error:
        raise InvalidHandler(f"{name}: {field}: {error}".replace("`", "")) from None
    if custom := _custom(kinds):
        raise InvalidHandler(
            f"{name}: {field}: {custom.__module__}.{custom.__qualname__} has no JSON form; "
            "use built-in types, dataclasses, TypedDicts or msgspec structs"
        )


def _custom(kind: object) -> type | None:
    """The first type in ``kind`` that msgspec does not know. Looks into containers and unions, not into classes."""
    if isinstance(kind, msgspec.inspect.CustomType):
        return kind.cls
    parts: list[object] = []
    for attribute in ("item_type", "key_type", "value_type", "type"):
        parts.append(getattr(kind, attribute, None))
    for attribute in ("item_types", "types"):
        parts.extend(getattr(kind, attribute, ()))
    found = (_custom(part) for part in parts if isinstance(part, msgspec.inspect.Type))
    return next((custom for custom in found if custom), None)
