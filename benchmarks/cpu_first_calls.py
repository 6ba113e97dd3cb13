"""Seconds of every operator's first call on the CPU, forward and backward, with nothing compiled before.

    python benchmarks/cpu_first_calls.py [OP ...]

Each operator has a process of its own and an empty folder for compiled code. The case is a small one, so
what is shown is compilation. Processor time is what a machine without other work would need.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

from mambaverse.bench.operators import list_ops

OPERATORS = ("selective_scan", "ssd", "causal_conv1d", "norm", "lti_conv")


def seconds(call: Callable[[], Any]) -> tuple[Any, str]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, f"{time.perf_counter() - wall:5.1f} s (processor {time.process_time() - cpu:.1f} s)"


def first_calls(op: str) -> None:
    import torch

    cases = importlib.import_module(f"mambaverse.kernels.{op}.cases")
    inputs = cases.make_inputs(cases.TESTED[0])
    for value in inputs.values():
        if torch.is_tensor(value) and (value.is_floating_point() or value.is_complex()):
            value.requires_grad_()
    result, forward = seconds(lambda: cases.run(inputs))
    outputs = [
        t for t in (result if isinstance(result, tuple) else (result,)) if torch.is_tensor(t) and t.requires_grad
    ]
    _, backward = seconds(lambda: torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs]))
    print(f"{op:15} forward {forward}, backward {backward}", flush=True)


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--one":
        first_calls(sys.argv[2])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", nargs="*", help=f"an operator of kernels/; if none is given: {', '.join(OPERATORS)}")
    operators, known = parser.parse_args().op, list_ops()
    if unknown := [op for op in operators if op not in known]:
        parser.error(f"no such operator: {', '.join(unknown)}; choose from {', '.join(known)}")
    for op in operators or OPERATORS:
        with TemporaryDirectory() as folder:
            environment = os.environ | {"NUMBA_CACHE_DIR": folder}
            subprocess.run([sys.executable, __file__, "--one", op], env=environment, check=True)


if __name__ == "__main__":
    main()
