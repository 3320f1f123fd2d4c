"""Who reads which partition."""

from __future__ import annotations

import pytest

from node.ownership import owned_by, owners


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7])
def test_every_partition_has_one_owner_and_no_node_has_more_than_its_share(count: int) -> None:
    nodes = [f"n{number}" for number in range(count)]
    chosen = owners(12, nodes)
    assert sorted(chosen) == list(range(12))
    loads = [len(owned_by(node, 12, nodes)) for node in nodes]
    assert sum(loads) == 12
    assert max(loads) <= -(-12 // count)


def test_the_answer_does_not_depend_on_the_order_of_the_nodes() -> None:
    assert owners(12, ["n1", "n2", "n3"]) == owners(12, ["n3", "n1", "n2"])


def test_a_node_that_leaves_and_returns_gets_its_partitions_back() -> None:
    whole = owners(12, ["n1", "n2", "n3"])
    without = owners(12, ["n1", "n3"])
    assert set(without.values()) == {"n1", "n3"}
    assert owners(12, ["n1", "n2", "n3"]) == whole


def test_without_nodes_nothing_is_owned() -> None:
    assert owners(12, []) == {}
