"""Reading ahead: order, how far ahead, where exceptions come out, and that no thread outlives it."""

import itertools
import threading
import time

import pytest

from infra.ahead import ReadAhead, map_ahead


def threads_named(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_results_come_in_the_order_of_the_items(threads):
    made = ReadAhead(lambda n: time.sleep((5 - n) / 500) or n * n, range(6), ahead=4, threads=threads)
    assert list(made) == [0, 1, 4, 9, 16, 25]
    assert list(made) == []
    made.close()


def test_no_more_is_begun_than_was_asked_for():
    begun = []
    made = ReadAhead(lambda n: begun.append(n) or n, itertools.count(), ahead=3)
    assert begun == []
    assert next(made) == 0
    made.close()
    assert len(begun) <= 3
    beside = ReadAhead(lambda n: begun.append(n) or n, itertools.count(100), ahead=3, threads=0)
    assert (next(beside), begun[-1]) == (100, 100)


def test_an_exception_comes_out_in_its_place_and_the_next_result_after_it():
    made = ReadAhead(lambda n: 1 // (n - 2), range(4), ahead=4)
    assert [next(made), next(made)] == [-1, -1]
    with pytest.raises(ZeroDivisionError):
        next(made)
    assert list(made) == [1]
    made.close()


def test_close_waits_for_what_is_in_work_and_begins_no_more():
    begun, may_end = [], threading.Event()

    def work(number: int) -> int:
        begun.append(number)
        assert may_end.wait(60) or number == 0
        return number

    made = ReadAhead(lambda n: n if n == 0 else work(n), itertools.count(), ahead=3, name="closing")
    assert next(made) == 0
    while not begun:
        time.sleep(0.001)
    made.close(wait=False)
    assert list(made) == []
    assert threads_named("closing")
    may_end.set()
    made.close()
    assert begun == [1]
    assert not threads_named("closing")


def test_each_thread_is_prepared_first():
    prepared = []
    made = ReadAhead(lambda n: len(prepared), range(3), ahead=1, start_thread=lambda: prepared.append(1))
    assert list(made) == [1, 1, 1]
    made.close()


def test_a_map_that_is_left_early_leaves_no_thread_behind():
    before = set(threading.enumerate())
    found = map_ahead(lambda n: 2 * n, itertools.count(), threads=2)
    assert [next(found), next(found)] == [(0, 0), (1, 2)]
    found.close()
    assert set(threading.enumerate()) <= before
