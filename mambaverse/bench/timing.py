"""How long a function takes and what memory it needs, on the host's clock or on a GPU's.

On a GPU a time is taken twice, each the median: `triton.testing.do_bench` calls the function from Python, so a short
one is timed by how fast its kernels are launched; the replay of a CUDA graph launches none. Both find a cold L2 cache.

The floor of an operator's forward is the larger of its bytes over the bandwidth and its exponentials over their rate.
Both constants are of one H100 80GB HBM3: 3.0 TB/s is its measured device copy, 3.7e12 exponentials a second are 16 a
clock and multiprocessor. An H100 of another kind has other memory, so no other device gets a floor. Matrix products
are not in it.
"""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from mambaverse.errors import warn

BUDGET_S = 2.0  # spent on timing one function
SLOW_S = 0.3  # a function slower than this is timed by the host's clock, on a GPU too: launches are nothing beside it
L2_BYTES = 256 << 20  # written between replays; more than any L2 cache holds
FLOOR_DEVICE = "H100 80GB HBM3"
BYTES_PER_S, EXPONENTIALS_PER_S = 3.0e12, 3.7e12  # of FLOOR_DEVICE
Function = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Median milliseconds of one function; NaN where a time was not taken."""

    eager_ms: float = math.nan  # called from Python
    graph_ms: float = math.nan  # replayed as a CUDA graph

    @property
    def ms(self) -> float:
        """The graph's time where there is one: that of the device alone."""
        return self.eager_ms if math.isnan(self.graph_ms) else self.graph_ms


class Clock(Protocol):
    """Times functions on one device."""

    @property
    def device(self) -> torch.device:
        """Where the functions' tensors are."""
        ...

    @property
    def kind(self) -> str:
        """Which cases, sizes and peers are due: those of "cpu" or "cuda"."""
        ...

    @property
    def name(self) -> str:
        """The device, and the versions that count there."""
        ...

    def times(self, function: Function, *, graph: bool = True) -> Times:
        """Time `function`; `graph` False: not as a CUDA graph."""
        ...

    def peak_mb(self, function: Function) -> float:
        """Return the megabytes (1e6 bytes) that `function` needs at once beyond what is allocated before; or NaN."""
        ...


def clock_for(device: torch.device, repeat: int) -> Clock:
    """Return the clock of a device, which takes the median of up to `repeat` runs."""
    return GpuClock(device, repeat) if device.type == "cuda" else HostClock(device, repeat)


@dataclass(frozen=True)
class HostClock:
    """The host's clock."""

    device: torch.device
    repeat: int

    @property
    def kind(self) -> str:
        """The device's type."""
        return self.device.type

    @property
    def name(self) -> str:
        """The processor, its threads and torch's version."""
        processor = platform.processor() or platform.machine()
        threads = torch.get_num_threads()
        return f"{processor}, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}"

    def times(self, function: Function, *, graph: bool = True) -> Times:
        """Return the median of up to `repeat` calls, fewer (but one) of a slow function, after one that warms up."""
        function()
        taken: list[float] = []
        while len(taken) < self.repeat and sum(taken) < BUDGET_S:
            taken.append(self._seconds(function))
        return Times(1e3 * statistics.median(taken))

    def peak_mb(self, function: Function) -> float:
        """Return NaN: memory is not watched here."""
        return math.nan

    def _seconds(self, function: Function) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start


@dataclass(frozen=True)
class GpuClock(HostClock):
    """The clock of a CUDA device, the current one."""

    @property
    def name(self) -> str:
        """The GPU, and torch's and Triton's versions."""
        import triton

        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"

    def times(self, function: Function, *, graph: bool = True) -> Times:
        """Return the medians of do_bench and of a CUDA graph's replays; of a slow function that of the host's clock."""
        from triton.testing import do_bench

        function()  # compiles
        if self._seconds(function) > SLOW_S and self._seconds(function) > SLOW_S:  # twice: a busy host may stall once
            return super().times(function)
        eager = do_bench(function, warmup=20, rep=100, return_mode="median")
        return Times(float(eager), self._graph_ms(function) if graph else math.nan)

    def peak_mb(self, function: Function) -> float:
        """Return the peak of one call after one that warms up, in megabytes."""
        function()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    def _seconds(self, function: Function) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def _graph_ms(self, function: Function) -> float:
        try:
            graph = self._capture(function)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # something in it waits for the device, say
            warn(f"bench: no CUDA graph, so no time of one: {str(error).partition(chr(10))[0]}")
            return math.nan
        cache = torch.empty(L2_BYTES, dtype=torch.int8, device=self.device)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.repeat)]
        graph.replay()
        for start, stop in events:
            cache.zero_()
            start.record()
            graph.replay()
            stop.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(stop) for start, stop in events)

    def _capture(self, function: Function) -> torch.cuda.CUDAGraph:
        """Capture on the stream that warmed it up: autograd ties what it keeps of a leaf to a stream."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            function()
        return graph


def floor_ms(device_name: str, moved_bytes: int, exponentials: int) -> float:
    """Return the least milliseconds that an H100 80GB HBM3 needs for what must be done; NaN for another device.

    Args:
        device_name: As CUDA gives it, or a clock's name, which begins with it.
        moved_bytes: Inputs read and outputs written.
        exponentials: Elementary functions; softplus and SiLU count two each.
    """
    if FLOOR_DEVICE not in device_name:
        return math.nan
    return 1e3 * max(moved_bytes / BYTES_PER_S, exponentials / EXPONENTIALS_PER_S)
