"""Promises of parallel_for: every item once, errors arrive; from any thread, in forked children, on either threads."""

import multiprocessing
import threading
from collections import Counter

import pytest
import torch

from mambaverse.kernels import threads


@pytest.fixture(params=["torch's threads", "our pool"], autouse=True)
def two_threads(request, monkeypatch):
    if request.param == "our pool":
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    elif threads._openmp() is None:
        pytest.skip("torch does not run on GNU's OpenMP here")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def items_done(num_items, grain=1):
    done: list[int] = []  # extend is atomic under the GIL
    threads.parallel_for(lambda start, stop: done.extend(range(start, stop)), num_items, grain=grain)
    return Counter(done)


@pytest.mark.parametrize("num_items, grain", [(0, 1), (1, 1), (2, 1), (7, 3), (100, 1)])
def test_every_item_is_worked_on_once(num_items, grain):
    assert items_done(num_items, grain) == Counter(range(num_items))


def test_two_threads_work():
    both = threading.Barrier(2, timeout=30)  # broken unless two calls are under way at once

    def meet(start, stop):
        both.wait()

    threads.parallel_for(meet, 2)


@pytest.mark.parametrize("item", [0, 5])
def test_an_error_reaches_the_caller_and_harms_no_later_call(item):
    def kernel(start, stop):
        if start == item:
            raise RuntimeError("item 5 is bad")

    with pytest.raises(RuntimeError, match="item 5 is bad"):
        threads.parallel_for(kernel, 10)
    assert items_done(10) == Counter(range(10))
    assert torch.ones(500, 500).mm(torch.ones(500, 500))[0, 0] == 500


def test_many_callers_at_once():
    results: list[Counter | None] = [None] * 4

    def call(i):
        results[i] = items_done(50)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(len(results))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    assert results == [Counter(range(50))] * len(results)


def _in_child(queue):
    torch.set_num_threads(2)
    queue.put(items_done(20) == Counter(range(20)))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # what is tested
def test_a_forked_child_works_after_its_parent_did():
    items_done(20)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    child.join(timeout=60)
    assert child.exitcode == 0
    assert queue.get()
