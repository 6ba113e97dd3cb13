"""This process among others, and the signals it gets: Accelerate's start and end, Ctrl-C, SIGTERM."""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType, GradientState
from accelerate.utils import GradientAccumulationPlugin, TorchDynamoPlugin

from mambaverse.config import TrainerConfig
from mambaverse.engine.data import Shard
from mambaverse.errors import UserError

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


@contextmanager
def launch(config: TrainerConfig) -> Iterator[Accelerator]:
    """Start Accelerate as `torchrun`, `accelerate launch` or nobody says, and leave the process as it was.

    Raises:
        UserError: no such device, a precision that it does not have, or a way of sharing a model that we do not have.
    """
    cpu = config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available())
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("trainer.device: cuda was asked for, but torch finds no GPU; trainer.device=auto takes the CPU")
    if config.precision == "fp16" and cpu:
        raise UserError("trainer.precision: fp16 needs a GPU; on a CPU use bf16 or fp32")
    ours = not AcceleratorState._shared_state  # Accelerate keeps one state a process: end only what was begun here
    threads, precision = torch.get_num_threads(), torch.backends.cuda.matmul.fp32_precision
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=PRECISIONS[config.precision],
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # else an environment variable divides
        dynamo_plugin=TorchDynamoPlugin(backend="inductor" if config.compile else "no", mode=config.compile),
    )
    # For a compiled model in float32, Accelerate turns TF32 on, and leaves it on for all that this process does later.
    if torch.backends.cuda.matmul.fp32_precision != precision:
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        if accelerator.distributed_type not in SUPPORTED:
            raise UserError(
                f"accelerate: {accelerator.distributed_type.value} is not supported; use one process or DDP"
            )
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        yield accelerator
    finally:
        torch.set_num_threads(threads)
        if ours:
            # A group of processes is joined once: the next launch finds it, and the end of the process leaves it.
            alone = accelerator.num_processes == 1
            AcceleratorState._reset_state(reset_partial_state=alone)
            GradientState._reset_state()
            if not alone:
                atexit.unregister(_leave_group)
                atexit.register(_leave_group)


def _leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def shard_of(accelerator: Accelerator) -> Shard:
    """Return this process's place."""
    return Shard(accelerator.process_index, accelerator.num_processes)


class StopRequest:
    """Within `with`, the first SIGINT or SIGTERM is noted in `signal`; the second does what it always did."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_back()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._give_back()
        # Not print: the signal may have arrived in the middle of one.
        os.write(2, f"\n{signal.Signals(number).name}: saving after this step; once more stops at once\n".encode())

    def _give_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
