"""The checks of the conformance kit: each takes a `Subject` and raises AssertionError where a promise does not hold."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from mambaverse.kernels.backend import BackendError, use_backend
from mambaverse.testing.subject import (
    GRID,
    LENGTH,
    TOLERANCE,
    Skip,
    Subject,
    call,
    needs,
    refuses,
    rows_of,
    run_and_differentiate,
    same,
    same_gradients,
    slope_error,
    tensors,
)

BF16_TOLERANCE = 3e-2  # a mixer's few layers, each rounded to bfloat16, which has 8 bits


def check_shapes(subject: Subject) -> None:
    """Any length from 1, any batch, any strides: y has x's shape, x is left alone, and two runs are bit-equal."""
    mixer = subject.build()
    for length in (1, 2, 7, LENGTH):
        for batch in (1, 3):
            x = subject.tokens(batch, length)
            y = call(mixer, x)
            if y.shape != x.shape or y.dtype != x.dtype:
                raise AssertionError(f"y of x {tuple(x.shape)} {x.dtype} is {tuple(y.shape)} {y.dtype}")
            same(f"y of x {tuple(x.shape)}, against its second run", y, call(mixer, x), 0.0)
    for axes, name in (((0, 1), "length before batch"), ((1, 2), "channels before length")):
        same(f"y of a strided x, {name}", call(mixer, x.transpose(*axes).contiguous().transpose(*axes)), y)
    same("the first row of a batch, run alone", call(mixer, x[:1]), y[:1])


def check_dtypes(subject: Subject) -> None:
    """In bfloat16, by `.to` and by autocast, y and its gradients are near those of the same weights in fp32.

    y is in bfloat16, under autocast in that or in x's dtype; so is that of `step` from `init_state`.
    """
    mixer = subject.build().to(torch.bfloat16)
    wide = subject.build().to(torch.bfloat16).float()
    x, weight = subject.tokens().to(torch.bfloat16), subject.tokens(seed=2).to(torch.bfloat16)
    expected = run_and_differentiate(wide, x.float(), weight.float(), [LENGTH])

    def near(what: str, actual: dict[str, Tensor]) -> None:
        y = actual.pop("y")
        same(f"y {what}, against fp32", y.float(), expected["y"], BF16_TOLERANCE)
        actual = {name: gradient.float() for name, gradient in actual.items()}
        gradients = {name: value for name, value in expected.items() if name != "y"}
        same_gradients(f"{what}, against fp32", actual, gradients, 2 * BF16_TOLERANCE)

    actual = run_and_differentiate(mixer, x, weight, [LENGTH])
    if actual["y"].dtype != torch.bfloat16:
        raise AssertionError(f"y of a bfloat16 x and bfloat16 parameters is {actual['y'].dtype}")
    near("in bfloat16", actual)
    if mixer.supports_state:
        with torch.no_grad():
            y, state = mixer.step(x[:, 0], mixer.init_state(x.shape[0]))
            what = "of a step in bfloat16, against forward"
            same(f"y {what}", y, call(mixer, x)[:, 0], BF16_TOLERANCE)
            y = call(mixer, x[:, 1:], state=state)
            same("y of what follows a step in bfloat16, against forward", y, call(mixer, x)[:, 1:], BF16_TOLERANCE)

    def autocast(x: Tensor) -> Tensor:
        with torch.autocast(torch.device(subject.device).type, dtype=torch.bfloat16):
            y: Tensor = call(wide, x)
        if y.dtype not in (torch.bfloat16, x.dtype):
            raise AssertionError(f"y of an fp32 x under bfloat16 autocast is {y.dtype}; expected bfloat16 or float32")
        return y

    near("under bfloat16 autocast", run_and_differentiate(wide, x.float(), weight.float(), [LENGTH], autocast))


def check_gradients(subject: Subject) -> None:
    """Every parameter and x get a finite gradient that is not 0, and it is the derivative of the forward pass."""
    mixer = subject.build()
    x = subject.tokens().requires_grad_()
    leaves = {"x": x, **dict(mixer.named_parameters())}
    weight = subject.tokens(seed=2)
    (call(mixer, x) * weight).sum().backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    for name in leaves:
        if name not in gradients:
            raise AssertionError(f"{name} gets no gradient: it is not used")
        if not torch.isfinite(gradients[name]).all():
            raise AssertionError(f"the gradient of {name} is not finite")
        if not gradients[name].any():
            raise AssertionError(f"the gradient of {name} is 0 everywhere")
    norm = sum(gradient.square().sum().item() for gradient in gradients.values()) ** 0.5
    for name, leaf in leaves.items():
        error = slope_error(mixer, x, weight, {name: (leaf, gradients[name])})
        own = gradients[name].norm().item()
        if not error < 0.02 * own + 2e-4 * norm:  # the second: what rounding y leaves of differences
            raise AssertionError(f"gradients differ from finite differences, that of {name} by {error / own:.1%} of it")
    y = call(mixer, x)
    cotangent = weight.transpose(1, 2).contiguous().transpose(1, 2)
    strided = dict(zip(leaves, torch.autograd.grad(y, [*leaves.values()], cotangent), strict=True))
    same_gradients("(its gradient, where that of y is strided)", strided, gradients)


def check_step(subject: Subject) -> None:
    """Forward equals step by step, and so do its gradients; either continues from where the other stopped."""
    mixer = subject.build()
    needs(mixer, "supports_state")
    x = subject.tokens()
    kept = x.clone()
    state, outputs = mixer.init_state(x.shape[0]), []
    for t, part in enumerate(tensors(state)):
        if part.shape[:1] != x.shape[:1]:
            raise AssertionError(f"init_state({x.shape[0]})[{t}] has shape {tuple(part.shape)}; expected batch first")
    with torch.no_grad():
        same("forward from init_state, against forward", call(mixer, x, state=state), call(mixer, x))
        for t in range(LENGTH):
            y_t, state = mixer.step(x[:, t], state)
            outputs.append(y_t)
        same("step by step, against forward", torch.stack(outputs, 1), call(mixer, x))
        more = subject.tokens(seed=4)
        _, carried = call(mixer, x, return_state=True)
        expected = call(mixer, torch.cat([x, more], 1))[:, LENGTH:]
        same("forward from the state that the steps left", call(mixer, more, state=state), expected)
        same("a step from the state that forward left", mixer.step(more[:, 0], carried)[0], expected[:, 0])
    if not torch.equal(x, kept):
        raise AssertionError("step wrote to x_t, or to the x of the forward whose state it was given")

    def stepped(x: Tensor) -> Tensor:
        state, outputs = mixer.init_state(x.shape[0]), []
        for x_t in x.unbind(1):
            y_t, state = mixer.step(x_t, state)
            outputs.append(y_t)
        return torch.stack(outputs, 1)

    weight = subject.tokens(seed=2)
    whole = run_and_differentiate(mixer, x, weight, [LENGTH])
    same_gradients("step by step, against forward", run_and_differentiate(mixer, x, weight, [LENGTH], stepped), whole)


def check_chunks(subject: Subject) -> None:
    """Forward equals two chunks with the state carried over; so do the gradients, which flow through it."""
    mixer = subject.build()
    needs(mixer, "supports_state")
    weight = subject.tokens(seed=2)
    whole = run_and_differentiate(mixer, subject.tokens(), weight, [LENGTH])
    for cut in (1, 2, LENGTH - 1):
        parts = run_and_differentiate(mixer, subject.tokens(), weight, [cut, LENGTH - cut])
        same_gradients(f"in chunks of {cut} and {LENGTH - cut}, against one", parts, whole)
    with torch.no_grad():
        _, state = call(mixer, subject.tokens(), return_state=True)
        kept = [part.clone() for part in tensors(state)]
        call(mixer, subject.tokens(seed=4), state=state)
    if not all(torch.equal(part, k) for part, k in zip(tensors(state), kept, strict=True)):
        raise AssertionError("forward wrote to the state that it was given")


def check_direction(subject: Subject) -> None:
    """Causal: nothing leaks from the future, and the past is seen. Not causal: both ends see each other."""
    mixer = subject.build()
    x = subject.tokens(1).requires_grad_()
    y = call(mixer, x)

    def influence(source: slice, target: slice) -> float:
        grad = torch.autograd.grad((y * subject.tokens(1, seed=2))[:, target].sum(), x, retain_graph=True)[0]
        return grad[:, source].norm().item() / grad.norm().item()

    if influence(slice(0, 1), slice(1, None)) == 0:
        raise AssertionError("the first token has no influence on those after it: nothing is mixed along the length")
    if not mixer.causal:
        for source, target in ((0, LENGTH - 1), (LENGTH - 1, 0)):
            if influence(slice(source, source + 1), slice(target, target + 1)) == 0:
                raise AssertionError(f"causal=False, but token {target} does not see token {source}")
        return
    for cut in range(1, LENGTH):
        leak = influence(slice(cut, None), slice(0, cut))
        if leak > TOLERANCE:
            raise AssertionError(f"causal=True, but tokens before {cut} depend on later ones (share {leak:.0e})")
        with torch.no_grad():
            changed = torch.cat([x[:, :cut], subject.tokens(1, LENGTH - cut, seed=5)], 1)
            what = f"y before token {cut}, after the tokens from it on changed"
            same(what, call(mixer, changed)[:, :cut], y[:, :cut])


def check_packed(subject: Subject) -> None:
    """Packed sequences (an empty one and one of a single token among them) equal the same sequences run separately."""
    mixer = subject.build()
    if mixer.needs_spatial_shape:
        raise Skip("needs_spatial_shape: it takes one grid, no packed sequences (refusal checked elsewhere)")
    lengths = (0, 3, 1, 0, 5, 3, 0)
    rows = [subject.tokens(1, length, seed=length + i) for i, length in enumerate(lengths)]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(device=subject.device, dtype=torch.int32)
    x = torch.cat(rows, 1)
    weight = subject.tokens(1, x.shape[1], seed=2)

    def separate(x: Tensor) -> Tensor:
        return torch.cat([call(mixer, row) for row in x.split(lengths, 1) if row.shape[1]], 1)

    def packed(x: Tensor) -> Tensor:
        y: Tensor = call(mixer, x, cu_seqlens=bounds)
        return y

    whole = [x.shape[1]]
    expected = run_and_differentiate(mixer, x, weight, whole, separate)
    same_gradients("packed, against separate", run_and_differentiate(mixer, x, weight, whole, packed), expected)
    refuses("a batch of 2 with cu_seqlens", lambda: call(mixer, x.expand(2, -1, -1), cu_seqlens=bounds))
    if not mixer.supports_state:
        return
    _, state = call(mixer, x, cu_seqlens=bounds, return_state=True)
    for part in tensors(state):
        if part.shape[0] != len(lengths):
            raise AssertionError(f"the state of {len(lengths)} packed sequences has shape {tuple(part.shape)}")
    more = subject.tokens(len(lengths), 4, seed=9)
    continued = torch.cat([call(mixer, torch.cat([row, more[i : i + 1]], 1))[:, -4:] for i, row in enumerate(rows)])
    same("a batch that continues from the packed sequences' state", call(mixer, more, state=state), continued)
    four = torch.arange(len(lengths) + 1).to(bounds) * 4
    again = call(mixer, more.flatten(0, 1)[None], state=state, cu_seqlens=four)
    same("packed sequences that continue from packed ones", again, continued.flatten(0, 1)[None])
    _, state = call(mixer, more[None, 0], state=state, cu_seqlens=four.clamp(max=4), return_state=True)
    again = call(mixer, more[1:], state=rows_of(state, slice(1, None)))
    same("a batch that continues where packed sequences were empty", again, continued[1:])


def check_padding(subject: Subject) -> None:
    """A padded batch that is packed, run and unpacked knows nothing of the padding; a causal mixer needs no packing."""
    mixer = subject.build()
    if mixer.needs_spatial_shape:
        raise Skip("needs_spatial_shape: it takes one grid, no packed sequences")
    lengths = torch.tensor([LENGTH, 5, 1])
    real = torch.arange(LENGTH)[None] < lengths[:, None]
    bounds = torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(device=subject.device, dtype=torch.int32)
    x = subject.tokens(3)
    y = torch.full_like(x, float("nan"))
    y[real] = call(mixer, x.masked_fill(~real[..., None].to(x.device), float("nan"))[real][None], cu_seqlens=bounds)[0]
    for row, length in enumerate(lengths.tolist()):
        alone = call(mixer, x[row : row + 1, :length])[0]
        same(f"{length} tokens, packed out of a batch padded to {LENGTH}", y[row, :length], alone)
        if mixer.causal:
            same(f"{length} tokens, padded to {LENGTH}", call(mixer, x[row : row + 1])[0, :length], alone)


def check_cpu_gpu(subject: Subject) -> None:
    """CPU and GPU give the same numbers, forward and backward; where no GPU kernel is, an error names what runs."""
    if not torch.cuda.is_available():
        raise Skip("no GPU")

    def run(device: str) -> dict[str, Tensor]:
        weight = subject.tokens(seed=2).to(device)
        return run_and_differentiate(subject.build().to(device), subject.tokens().to(device), weight, [LENGTH])

    refused = ""
    try:
        on_gpu = run("cuda")
    except BackendError as error:
        if 'use_backend("reference")' not in str(error):
            raise
        refused = str(error)
        with use_backend("reference"):
            on_gpu = run("cuda")
    same_gradients("on the GPU, against the CPU", {name: value.cpu() for name, value in on_gpu.items()}, run("cpu"))
    if refused:
        raise Skip(f"{refused} (there it gives the numbers of the CPU)")


def check_state_dict(subject: Subject) -> None:
    """A state dict, saved and loaded, carries the mixer over whole, whatever it ran on; so does a deep copy, apart.

    Weight decay is told of parameters that exist.
    """
    mixer, other = subject.build(), subject.build(seed=7)
    x = subject.tokens()
    made = {name: tuple(value.shape) for name, value in mixer.state_dict().items()}
    if torch.equal(call(mixer, x), call(other, x)):
        raise AssertionError("two mixers with different random parameters give the same output")
    other.load_state_dict({name: value.clone() for name, value in mixer.state_dict().items()})
    same("y after load_state_dict", call(other, x), call(mixer, x), 0.0)
    if (after := {name: tuple(value.shape) for name, value in mixer.state_dict().items()}) != made:
        raise AssertionError(f"forward changes the shapes of the state dict: {made} became {after}")
    copied, y = copy.deepcopy(mixer), call(mixer, x)
    same("y of a deep copy", call(copied, x), y, 0.0)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.zero_()
    same("y of a deep copy, after the original's parameters changed", call(copied, x), y, 0.0)
    if unknown := mixer.no_weight_decay() - {name for name, _ in mixer.named_parameters()}:
        raise AssertionError(f"no_weight_decay names parameters that do not exist: {sorted(unknown)}")


def check_compile(subject: Subject, backend: str = "eager") -> None:
    """torch.compile captures it whole (`fullgraph=True`), forward and backward, with the same numbers."""
    mixer = subject.build()
    x, weight = subject.tokens(), subject.tokens(seed=2)
    torch.compiler.reset()
    compiled = torch.compile(mixer, backend=backend, fullgraph=True)
    expected = run_and_differentiate(mixer, x, weight, [LENGTH])
    actual = run_and_differentiate(mixer, x, weight, [LENGTH], lambda x: call(compiled, x))
    same_gradients("under torch.compile, against eager", actual, expected)
    if mixer.supports_cu_seqlens:
        bounds = torch.tensor([0, 5, LENGTH], dtype=torch.int32, device=x.device)
        y = call(compiled, x[:1], cu_seqlens=bounds)
        same("packed sequences under torch.compile, against eager", y, call(mixer, x[:1], cu_seqlens=bounds))


def check_refusals(subject: Subject) -> None:
    """What the mixer declares that it does not support, it refuses with a ValueError."""
    mixer = subject.build()
    x = subject.tokens()
    refuses("x without a batch axis", lambda: mixer(x=x[0]))
    if mixer.supports_state and not mixer.causal:
        raise AssertionError("supports_state=True with causal=False: a state can only hold what came before")
    if not mixer.supports_state:
        refuses("supports_state=False, return_state=True", lambda: call(mixer, x, return_state=True))
        refuses("supports_state=False, a state", lambda: call(mixer, x, state=x))
        refuses("supports_state=False, init_state", lambda: mixer.init_state(2))
        refuses("supports_state=False, step", lambda: mixer.step(x[:, 0], x))
    if mixer.needs_spatial_shape:
        refuses("needs_spatial_shape=True, none given", lambda: mixer(x=x))
        refuses("spatial_shape of another length", lambda: mixer(x=x, spatial_shape=(LENGTH, 2)))
        bounds = torch.tensor([0, LENGTH], dtype=torch.int32, device=x.device)
        refuses("needs_spatial_shape=True, cu_seqlens", lambda: call(mixer, x[:1], cu_seqlens=bounds))
    elif x.device.type == "cpu":  # on a GPU the values are not looked at
        bounds = torch.tensor([0, LENGTH + 1], dtype=torch.int32)
        refuses("cu_seqlens that do not end at L", lambda: call(mixer, x[:1], cu_seqlens=bounds))


def check_step_sizes(subject: Subject) -> None:
    """`step_sizes` gives each token's Δ, (B, L, channels) by the name of the scan; a causal mixer's from x[..t]."""
    mixer, x = subject.build(), subject.tokens()
    with torch.no_grad():
        found = mixer.step_sizes(x, GRID)
        if not found:
            raise Skip("it tells no Δ")
        later = x.clone()
        later[:, -1] += 1
        changed = mixer.step_sizes(later, GRID)
    for name, dt in found.items():
        if dt.ndim != 3 or dt.shape[:2] != x.shape[:2] or dt.dtype not in (torch.float32, torch.float64):
            raise AssertionError(f"step_sizes[{name!r}] of x {tuple(x.shape)} is {tuple(dt.shape)} {dt.dtype}")
        if not (torch.isfinite(dt) & (dt >= 0)).all():
            raise AssertionError(f"step_sizes[{name!r}] is not at least 0 everywhere")
        if mixer.causal:
            same(f"step_sizes[{name!r}] before a token that changed", changed[name][:, :-1], dt[:, :-1])
