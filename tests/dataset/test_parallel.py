"""Several items at a time, each with its own result, and no more of them than asked for."""

import threading
import time

import pytest

from dataset.parallel import in_any_order


def double(item):
    return item * 2


@pytest.mark.parametrize("num_workers", [0, 3])
def test_each_item_gets_its_result(num_workers):
    made = in_any_order(double, range(20), num_workers)
    assert sorted(made) == [(i, 2 * i) for i in range(20)]
    assert list(in_any_order(double, [], num_workers)) == []


def test_what_is_slow_holds_nothing_up():
    gate = threading.Event()

    def work(item):
        return item > 0 or gate.wait(20)

    made = in_any_order(work, range(10), 2)
    assert sorted(next(made)[0] for _ in range(9)) == list(range(1, 10))
    gate.set()
    assert list(made) == [(0, True)]


def test_no_more_is_taken_than_two_items_a_worker():
    taken = []
    made = in_any_order(double, (taken.append(i) or i for i in range(100)), 3)
    for given in range(1, 20):
        next(made)
        time.sleep(0.001)
        assert len(taken) <= given + 2 * 3


def test_a_mistake_ends_the_whole():
    taken = []

    def work(item):
        if item == 5:
            raise KeyError("no such thing")
        return item

    with pytest.raises(KeyError, match="no such thing"):
        list(in_any_order(work, (taken.append(i) or i for i in range(1000)), 2))
    assert len(taken) < 20
