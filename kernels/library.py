"""Registration of an operator pair `mambaverse::<op>` and `mambaverse::<op>_backward` with torch.

`torch.library.Library` is used rather than `custom_op`: the same features (fake, autograd, export, TorchScript) at a
fraction of the cost per call, which small models would feel. For the same reason the gradient is registered by hand:
`torch.library.register_autograd` looks through the schema at every call.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mambaverse.kernels.launch import compiled_together

LIBRARY = torch.library.Library("mambaverse", "FRAGMENT")  # owns every registration; must live as long as the process
_COUNTER = "torch.utils.flop_counter"
_FORMULAS: dict[str, Callable[..., int]] = {}  # that wait for the counter's import
_REVERSE = "use tensor.backward() or torch.autograd.grad"


def define_op(name: str, schema: str, forward: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register `mambaverse::name` with a `forward` for every device and its `fake` (shapes, dtypes, strides only).

    Args:
        name: Operator name, e.g. "selective_scan" or "selective_scan_backward".
        schema: Arguments and returns in torch's schema language, e.g. "(Tensor x, str backend) -> Tensor".
        forward: Runs under no autograd; must return fresh tensors (no alias of an input) with the fake's strides, and
            write to no other than those that the schema says. May be called twice: see `launch.compiled_together`.
        fake: Same arguments; returns empty tensors.
    """
    LIBRARY.define(f"{name}{schema}")
    writes_to_inputs = "!" in schema
    run = forward if writes_to_inputs else partial(compiled_together, forward)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mambaverse::{name}", fake, lib=LIBRARY)


class _Ahead:
    """Stands for autograd's context in a backward that is called for the sake of its kernels alone."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


class _Once(torch.autograd.Function):
    """Stands in the graph of gradients that were computed without one, so that nobody differentiates past them.

    torch's own `once_differentiable` is passed over where `torch.autograd.grad` knows another way to its inputs.
    """

    @staticmethod
    def forward(ctx: Any, name: str, gradients: Sequence[Tensor | None], *sources: Tensor | None) -> Any:
        ctx.name = name
        return tuple(gradients)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise NotImplementedError(f"{ctx.name} has no second derivative: its gradient is worked out without a graph")


def differentiable_once(
    name: str, gradients: Sequence[Tensor | None], sources: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Return gradients, worked out of `sources` without a graph, whose own derivative raises NotImplementedError."""
    return tuple(_Once.apply(name, gradients, *sources))


def define_gradient(
    name: str, setup_context: Callable[..., None], backward: Callable[..., Any], compile_ahead: bool = False
) -> None:
    """Give `mambaverse::name` its gradient.

    Args:
        name: A name that `define_op` registered.
        setup_context: `setup_context(ctx, inputs, output)` saves what backward needs.
        backward: `backward(ctx, *grads)` calls `mambaverse::<name>_backward` and returns one gradient an input.
        compile_ahead: Where forward lacks kernels, compile those of backward beside them: for operators whose kernels
            take seconds, and of whose outputs the first alone has a gradient in training.

    What it cannot do raises NotImplementedError: a second derivative through `mambaverse::<name>_backward` and a
    forward-mode one, both of which torch by itself takes for 0, and torch.func.grad.
    """
    operator = getattr(torch.ops.mambaverse, name).default

    def below(keyset: torch._C.DispatchKeySet, inputs: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            given, keyset = inputs[:-1], inputs[-1]

            def look_ahead(output: Any) -> None:
                context = _Ahead(ctx.needs_input_grad)
                setup_context(context, given, output)
                backward(context, output[0], *[None] * (len(output) - 1))

            output = _no_views(compiled_together(below, keyset, given, ahead=look_ahead if compile_ahead else None))
            setup_context(ctx, given, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            if once and torch.is_grad_enabled():  # create_graph=True
                with torch.no_grad():
                    gradients = backward(ctx, *grads)
                return *differentiable_once(f"mambaverse::{name}", gradients, (*grads, *ctx.saved_tensors)), None
            return *backward(ctx, *grads), None

    Gradient.__name__ = f"GradientOf_{name}"
    once = hasattr(torch.ops.mambaverse, f"{name}_backward")  # which has no gradient; without one, torch's own are used

    def differentiable(keyset: torch._C.DispatchKeySet, *inputs: Any) -> Any:
        if forward_ad._current_level >= 0 and any(_has_tangent(value) for value in inputs):
            raise NotImplementedError(f"mambaverse::{name} has no forward-mode derivative, torch.func.jvp: {_REVERSE}")
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            if torch._C._are_functorch_transforms_active():
                raise NotImplementedError(f"mambaverse::{name} has no torch.func.grad: {_REVERSE}")
            return Gradient.apply(*inputs, keyset)
        return below(keyset, inputs)

    LIBRARY.impl(name, differentiable, "Autograd", with_keyset=True)


def _no_views(output: Any) -> Any:
    """Return an operator's output, the same memory, without views, which torch would refuse to change in place."""
    if isinstance(output, Tensor):
        return torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output
    return tuple(_no_views(tensor) for tensor in output)


def _has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


def define_flops(name: str, count: Callable[..., int]) -> None:
    """Tell `torch.utils.flop_counter` what `mambaverse::name` costs.

    What is counted is the recurrence as it is written down, whatever a backend computes twice or in another order: a
    multiplication, an addition and an exponential are one each, so a multiply-add two, as in torch's own formulas.

    Args:
        name: A name that `define_op` registered.
        count: Takes the operator's own arguments.
    """

    def formula(*arguments: Any, out_val: Any = None, **named: Any) -> int:
        return count(*arguments, **named)

    if _COUNTER in sys.modules:
        _register(name, formula)
    else:
        _FORMULAS[name] = formula


def _register(name: str, formula: Callable[..., int]) -> None:
    sys.modules[_COUNTER].register_flop_formula(getattr(torch.ops.mambaverse, name), get_raw=True)(formula)


class _WhenCounterIsImported(MetaPathFinder):
    """Registers the formulas after the counter's first import. It loads Triton, which an operator alone must not."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)  # what follows is the import as it would be without this
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                for waiting, formula in _FORMULAS.items():
                    _register(waiting, formula)
                _FORMULAS.clear()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _WhenCounterIsImported())
