"""Threads for numba kernels that release the GIL: `parallel_for` splits a range of work items over a small pool.

numba's own threading layers are not all safe to enter from several threads at once, nor after `fork`. Here a kernel is
a plain `@njit(nogil=True)` function `kernel(start, stop, *args)` that works on items start .. stop - 1, and the threads
are ours:

- the caller works too, so `torch.set_num_threads(1)` (as in DataLoader workers) means no other thread at all;
- items are handed out in small blocks, so a thread that is held up by someone else's work only does fewer of them;
- results never depend on the number of threads, because an item is computed by one thread alone;
- after `fork` the child makes a pool of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from threading import Lock
from typing import Any

import torch

_pool: ThreadPoolExecutor | None = None
_lock = Lock()


def _forget_pool() -> None:
    """Drop the pool and the lock of the parent process: its threads do not exist in a forked child."""
    global _pool, _lock
    _pool, _lock = None, Lock()


os.register_at_fork(after_in_child=_forget_pool)


def _get_pool() -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="mambaverse")
        return _pool


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

    helpers = [_get_pool().submit(work) for _ in range(num_threads - 1)]
    try:
        work()
    finally:
        for helper in helpers:
            # A helper that has not started yet is no longer needed. (Also what makes this safe to call from many
            # threads at once: nobody ever waits for a job that is still in the queue.)
            if not helper.cancel():
                helper.result()
