"""Where a client's ids come from."""

from __future__ import annotations

import threading

from dedup.ids import KEY_BYTES, Ids
from oncekeeper.errors import ClusterUnreachable
from oncekeeper.idsource import RANGE_IDS_MAX, RANGE_IDS_MIN, IdSource


class Ledger:
    def __init__(self) -> None:
        self.next = 1
        self.asked: list[int] = []
        self.down = False
        self.skip = 0
        self.threads: list[threading.Thread] = []

    def __call__(self, count: int) -> tuple[int, int]:
        self.asked.append(count)
        self.threads.append(threading.current_thread())
        if self.down:
            raise ClusterUnreachable("no node answers")
        self.next += self.skip
        start, self.next = self.next, self.next + count
        return start, count


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def source(ledger: Ledger, clock: Clock | None = None) -> IdSource:
    return IdSource(ledger, clock or Clock(), lambda count: b"r" * count)


def test_ids_are_taken_in_order_and_none_twice() -> None:
    ids = source(Ledger())
    taken = [i for n in range(1, 40) for i in ids.take(n)]
    assert taken == list(range(1, len(taken) + 1))


def test_a_single_submit_asks_for_few_ids() -> None:
    ledger = Ledger()
    source(ledger).take(1)
    assert ledger.asked == [RANGE_IDS_MIN]


def test_requests_grow_up_to_a_full_range() -> None:
    ledger = Ledger()
    ids = source(ledger)
    for _ in range(200):
        ids.take(2000)
    assert sorted(ledger.asked) == ledger.asked
    assert max(ledger.asked) == RANGE_IDS_MAX


def test_a_large_need_is_met_from_several_ranges() -> None:
    ledger = Ledger()
    ledger.skip = 10  # somebody else takes ids in between
    ids = source(ledger).take(150_000)
    assert len(ids) == len(set(ids)) == 150_000
    assert len(ids.runs) == 3


def test_the_next_range_is_asked_for_before_the_last_is_used_up() -> None:
    ledger = Ledger()
    ids = source(ledger)
    ids.take(100)
    ids.take(1)
    assert ledger.asked == [100, 800]
    me = threading.current_thread()
    assert [thread is me for thread in ledger.threads] == [True, False]


def test_without_a_node_ids_are_random_and_nodes_are_left_alone_for_a_while() -> None:
    ledger, clock = Ledger(), Clock()
    ledger.down = True
    ids = source(ledger, clock)
    assert ids.take(2) == Ids(keys=(b"r" * KEY_BYTES,) * 2)
    assert ids.take(1).keys
    assert len(ledger.asked) == 1
    ledger.down, clock.now = False, 1.5
    assert ids.take(1).runs


def test_what_is_left_of_a_range_is_used_while_nodes_are_down() -> None:
    ledger = Ledger()
    ids = source(ledger)
    ids.take(1)
    ledger.down = True
    assert ids.take(60).runs == ((2, 60),)
    assert ids.take(60).keys
    assert ids.take(3).runs == ((62, 3),)


def test_threads_never_share_an_id() -> None:
    ids = source(Ledger())
    taken: list[list[object]] = [[] for _ in range(4)]

    def work(mine: list[object]) -> None:
        for _ in range(200):
            mine.extend(ids.take(17))

    threads = [threading.Thread(target=work, args=(mine,)) for mine in taken]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    every = [task_id for mine in taken for task_id in mine]
    assert len(every) == len(set(every)) == 4 * 200 * 17
