"""Threads for numba kernels that release the GIL: `parallel_for` splits a range of work items over torch's threads.

numba's own threading layers are not all safe to enter from several threads at once, nor after `fork`. Here a kernel is
a plain `@njit(nogil=True)` function `kernel(start, stop, *args)` that works on items start .. stop - 1. The threads are
those of torch where it runs on GNU's OpenMP (its Linux builds): after an operator of torch they spin for milliseconds
in the hope of more work, and other threads would share the cores with them. Elsewhere they are a pool of our own.

- the caller works too, so `torch.set_num_threads(1)` (as in DataLoader workers) means no other thread at all;
- items are handed out in small blocks, so a thread that is held up by someone else's work only does fewer of them;
- results never depend on the number of threads, because an item is computed by one thread alone;
- after `fork` the child, in which OpenMP's threads are gone for good, makes a pool of its own.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any

import torch

_pool: ThreadPoolExecutor | None = None
_lock = Lock()
_forked = False
_Member = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _forget_pool() -> None:
    """Drop the pool and the lock of the parent process: its threads do not exist in a forked child."""
    global _pool, _lock, _forked
    _pool, _lock, _forked = None, Lock(), True


os.register_at_fork(after_in_child=_forget_pool)


def _get_pool() -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="mambaverse")
        return _pool


@cache
def _openmp() -> Any:
    """Return GOMP_parallel(function, data, number of threads, flags) of torch's own OpenMP, or None."""
    if not sys.platform.startswith("linux"):
        return None
    for path in sorted(Path(torch.__file__).parent.joinpath("lib").glob("libgomp*.so*")):
        try:
            start_team = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_NOW).GOMP_parallel
        except (OSError, AttributeError):  # a library that torch did not load, or another one of that name
            continue
        start_team.argtypes, start_team.restype = (_Member, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
        return start_team
    return None


def _run_in_team(start_team: Any, work: Callable[[], None]) -> None:
    """Call `work` in every thread of torch's team, the caller among them, and raise what one of them raised."""
    raised: list[BaseException] = []

    def member(_: int | None) -> None:
        try:
            work()
        except BaseException as error:  # must not cross the C code in between
            raised.append(error)

    # always of torch's size: a team of another one would end threads that torch's next operator starts again
    start_team(_Member(member), None, torch.get_num_threads(), 0)
    if raised:
        raise raised[0]


def _run_in_pool(work: Callable[[], None], num_threads: int) -> None:
    """Call `work` in the caller and `num_threads` - 1 threads of our own."""
    helpers = [_get_pool().submit(work) for _ in range(num_threads - 1)]
    try:
        work()
    finally:
        for helper in helpers:
            # A helper that has not started yet is no longer needed. (Also what makes this safe to call from many
            # threads at once: nobody ever waits for a job that is still in the queue.)
            if not helper.cancel():
                helper.result()


def parallel_for(kernel: Callable[..., None], num_items: int, *args: Any, grain: int = 1) -> None:
    """Call `kernel(start, stop, *args)` until every item of `range(num_items)` has been worked on.

    Args:
        kernel: Releases the GIL (`numba.njit(nogil=True)`); items must not write to each other's memory.
        num_items: Number of independent work items.
        args: Passed to every call.
        grain: Items a call works on at least (more for items that are cheaper than a Python call, about 1 µs).
    """
    num_blocks = -(-num_items // grain)
    num_threads = min(torch.get_num_threads(), num_blocks)
    if num_threads <= 1:
        if num_items:
            kernel(0, num_items, *args)
        return
    tickets = count()  # next() on itertools.count is atomic under the GIL

    def work() -> None:
        while (block := next(tickets)) < num_blocks:
            kernel(block * grain, min((block + 1) * grain, num_items), *args)

    start_team = None if _forked else _openmp()
    if start_team is None:
        _run_in_pool(work, num_threads)
    else:
        _run_in_team(start_team, work)
