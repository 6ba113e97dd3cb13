"""The optimizer and the learning rate's schedule, by timm's names, from the `optim` section of a config."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import timm.optim
import torch
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from mambaverse.config import OptimConfig
from mambaverse.errors import UserError, suggest, warn

SCHEDULES = {  # those that step by update, with the arguments that change their rates beside `ALWAYS`
    "constant": (),
    "cosine": ("k_decay", "min_lr", "warmup_prefix"),
    "multistep": ("decay_milestones", "decay_rate"),
    "poly": ("decay_rate", "k_decay", "min_lr", "warmup_prefix"),
    "rsqrt": ("decay_epochs", "decay_fn", "min_lr", "stable_timescale", "warmup_prefix"),
    "step": ("decay_epochs", "decay_rate"),
    "tanh": ("min_lr", "warmup_prefix"),
    "wsd": ("decay_epochs", "decay_fn", "min_lr", "warmup_prefix"),
}
ALWAYS = ("noise", "noise_pct", "noise_seed", "noise_std", "warmup_lr")
REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def create_optimizer(model: nn.Module, config: OptimConfig, *, capturable: bool = False) -> torch.optim.Optimizer:
    """Return the optimizer of `model`.

    Weight decay leaves out vectors, and what `model.no_weight_decay()` names; with `layer_decay` the rates fall from
    the head down, along `model.group_matcher()`. Muon takes AdamW's steps for what has no decay: A_log (D, N) is a
    table of numbers, not a matrix that multiplies anything. torch's fused form is taken where there is one: a step over
    the 116 tensors of a small model takes 0.8 ms rather than 3.1 ms on a CPU. With `capturable`, on a GPU, a
    step may be captured as a CUDA graph if the optimizer knows how (its `defaults` then have `capturable`).

    Raises:
        UserError: unknown optimizer, one that needs what is not here, or an argument that it does not have.
    """
    known = [str(name) for name in timm.optim.list_optimizers()]
    if config.name not in known:
        raise UserError(f"optim.name: unknown optimizer {config.name!r}{suggest(config.name, known)}")
    info = timm.optim.get_optimizer_info(config.name)
    if info.second_order:
        raise UserError(f"optim.name: {config.name} needs second derivatives, which training here does not compute")
    try:
        chosen = timm.optim.get_optimizer_class(config.name, bind_defaults=False)
    except (ImportError, AssertionError) as error:  # as of those that need apex and CUDA
        raise UserError(f"optim.name: {config.name} cannot be had here: {error}") from error
    arguments, parameters = dict(config.args), inspect.signature(chosen).parameters
    plain = not {"foreach", "differentiable"} & arguments.keys()  # neither goes with fused
    if "fused" in parameters and plain and all(p.is_floating_point() for p in model.parameters()):
        arguments.setdefault("fused", True)
    if capturable and "capturable" in parameters:
        arguments.setdefault("capturable", True)
    make = _factory(info)

    def create(module: nn.Module, layer_decay: float | None) -> torch.optim.Optimizer:
        return make(
            module,
            opt=config.name,
            lr=config.lr,
            weight_decay=config.weight_decay,
            layer_decay=layer_decay,
            fallback_no_weight_decay="muon" in config.name,
            **arguments,
        )

    try:
        if config.args:
            _try_steps(lambda tiny: create(tiny, None), model)
        return create(model, config.layer_decay)
    except REFUSALS as error:
        given = f"; optim.args={config.args}" if config.args else ""
        raise UserError(f"optim: {config.name} refused its arguments: {_said(error)}{given}") from error


def _try_steps(create: Callable[[nn.Module], torch.optim.Optimizer], model: nn.Module) -> None:
    """Take two steps with parameters of its own, where `model` is: some arguments are first read there."""
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        tiny = nn.Linear(8, 8, device=device)  # Muon leaves smaller matrices to AdamW
        optimizer = create(tiny)
        for _ in range(2):
            for parameter in tiny.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()


def _factory(info: timm.optim.OptimInfo) -> Callable[..., torch.optim.Optimizer]:
    """Return what creates the optimizer of timm's entry `info`; Muon's matrices are then taken in batches."""
    if info.opt_class is not timm.optim.Muon:
        return timm.optim.create_optimizer_v2
    from mambaverse.engine.muon import BatchedMuon

    registry = timm.optim.OptimizerRegistry()
    registry.register(replace(info, opt_class=BatchedMuon))
    return registry.create_optimizer


class Schedule:
    """The learning rate as a function of the number of optimizer steps taken."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: OptimConfig, epochs: int, epoch_updates: int) -> None:
        if config.schedule not in SCHEDULES:
            raise UserError(
                f"optim.schedule: unknown schedule {config.schedule!r}{suggest(config.schedule, SCHEDULES)}"
            )
        _check_schedule(config, epochs)
        arguments: dict[str, Any] = {"min_lr": config.min_lr, "warmup_lr": config.warmup_lr, **config.schedule_args}
        self._scheduler: Scheduler
        try:
            self._scheduler, _ = create_scheduler_v2(
                optimizer,
                sched=config.schedule,
                num_epochs=epochs,
                warmup_epochs=config.warmup_epochs,  # type: ignore[arg-type]  # half an epoch is well
                step_on_epochs=False,
                updates_per_epoch=epoch_updates,
                **arguments,
            )
            self._try(optimizer, config, epochs * epoch_updates)
        except UserError:
            raise
        except REFUSALS as error:
            raise UserError(f"optim: {config.schedule} refused its arguments: {_said(error)}") from error

    def _try(self, optimizer: torch.optim.Optimizer, config: OptimConfig, updates: int) -> None:
        """Raise UserError for rates that mean nothing, which would come up hours later; rates stay as they are."""
        given = [group["lr"] for group in optimizer.param_groups]
        for update in sorted({round(share * updates) for share in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)}):
            self.step(update)
            for group in optimizer.param_groups:
                if not 0 <= group["lr"] < math.inf:
                    raise UserError(
                        f"optim: {config.schedule} has a learning rate of {group['lr']:g} after {update:,} of "
                        f"{updates:,} steps; see optim.schedule_args"
                    )
        for group, lr in zip(optimizer.param_groups, given, strict=True):
            group["lr"] = lr

    def step(self, updates: int) -> None:
        """Set the rates of the step that follows `updates` steps; they depend on nothing else."""
        self._scheduler.step_update(updates)


def _check_schedule(config: OptimConfig, epochs: int) -> None:
    """Raise UserError for an argument that changes nothing of the schedule; warn of a rate that is never reached."""
    read = (*SCHEDULES[config.schedule], *ALWAYS)
    for name, value in config.schedule_args.items():
        if name not in read:
            raise UserError(
                f"optim: {config.schedule} refused its arguments: optim.schedule_args.{name}={value} changes no rate "
                f"of it{suggest(name, read)}"
            )
    if config.warmup_epochs > epochs:
        warn(
            f"optim.warmup_epochs={config.warmup_epochs:g}: longer than trainer.epochs={epochs}, so that the rate does "
            f"not reach optim.lr={config.lr:g}"
        )


def _said(error: Exception) -> str:
    """Return an error's text in one line; of a missing key it is the key alone, so that its kind is said too."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if isinstance(error, KeyError) else text
