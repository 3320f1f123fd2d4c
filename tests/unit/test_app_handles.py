"""Handles of many tasks behave as the list they stand for, without being one."""

from __future__ import annotations

from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedup.ids import Ids
from oncekeeper.client import Client
from oncekeeper.handle import Handle, Handles

CLIENT = cast(Client, None)  # never asked here

runs = st.lists(st.tuples(st.integers(1, 10**6), st.integers(1, 20)), max_size=4).map(lambda r: Ids(tuple(r)))
keys = st.lists(st.binary(min_size=16, max_size=16), max_size=4).map(lambda k: Ids(keys=tuple(k)))


@given(parts=st.lists(runs | keys, max_size=5), start=st.integers(-30, 60), stop=st.integers(-30, 60))
def test_handles_are_a_sequence(parts: list[Ids], start: int, stop: int) -> None:
    handles: Handles[Any] = Handles(CLIENT, parts)
    expected = [Handle[Any](CLIENT, task_id) for part in parts for task_id in part]
    assert list(handles) == expected
    assert len(handles) == len(expected)
    assert list(handles[start:stop]) == expected[start:stop]
    if -len(expected) <= start < len(expected):
        assert handles[start] == expected[start]
    else:
        with pytest.raises(IndexError):
            handles[start]


def test_a_million_handles_cost_a_run() -> None:
    handles: Handles[Any] = Handles(CLIENT, [Ids(((1, 10**6),))])
    assert handles.parts == (Ids(((1, 10**6),)),)
    assert handles[999_999].id == "1000000"
    assert handles[10:20].parts == (Ids(((11, 10),)),)
    with pytest.raises(ValueError, match="step=2 must be 1"):
        handles[::2]
