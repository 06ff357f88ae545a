"""Several items at a time, each with its own result, and no more of them than asked for."""

import threading

import pytest

from dataset.parallel import in_any_order


@pytest.mark.parametrize("num_workers", [0, 3])
def test_each_item_gets_its_result_and_no_more_is_taken_than_two_items_a_worker(num_workers):
    taken, made = [], []
    items = (taken.append(i) or i for i in range(20))
    for item, result in in_any_order(lambda item: item * 2, items, num_workers):
        assert result == 2 * item
        made.append(item)
        assert len(taken) <= len(made) + 2 * num_workers
    assert sorted(made) == list(range(20))


def test_what_is_slow_holds_nothing_up():
    gate = threading.Event()
    made = in_any_order(lambda item: item > 0 or gate.wait(20), range(10), 2)
    assert sorted(next(made)[0] for _ in range(9)) == list(range(1, 10))
    gate.set()
    assert list(made) == [(0, True)]


def test_a_mistake_ends_the_whole():
    taken = []
    with pytest.raises(ZeroDivisionError):
        list(
            in_any_order(
                lambda item: 1 // (item - 5), (taken.append(i) or i for i in range(999)), 2
            )
        )
    assert len(taken) < 20
