"""The conformance kit: what every mixer promises (`mambaverse.mixers.base.Mixer`), checked in one call.

    from mambaverse.testing import check_mixer

    check_mixer("mine", dim=16, d_state=4)      # a registered name, "package.module:Class", or the class itself

Every check compares a mixer with itself: the same tokens, run in another way, give the same numbers. What a mixer
declares that it does not support, it must refuse with a ValueError. With pytest, one test a check:

    @pytest.mark.parametrize("check", MIXER_CHECKS)
    def test_mine(check):
        check_mixer("mine", dim=16, checks=[check])
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from mambaverse.errors import suggest
from mambaverse.mixers import Mixer
from mambaverse.testing import checks as _checks
from mambaverse.testing import conditions as _conditions
from mambaverse.testing.subject import Skip, Subject, seeded

__all__ = ["MIXER_CHECKS", "Subject", "check_mixer"]

MIXER_CHECKS: dict[str, Callable[[Subject], None]] = {
    "shapes": _checks.check_shapes,
    "dtypes": _checks.check_dtypes,
    "gradients": _checks.check_gradients,
    "step": _checks.check_step,
    "chunks": _checks.check_chunks,
    "direction": _checks.check_direction,
    "packed": _checks.check_packed,
    "padding": _checks.check_padding,
    "cpu_gpu": _checks.check_cpu_gpu,
    "state_dict": _checks.check_state_dict,
    "meta": _conditions.check_meta,
    "compile": _checks.check_compile,
    "refusals": _checks.check_refusals,
    "step_sizes": _checks.check_step_sizes,
    "long": _conditions.check_long,
    "grid": _conditions.check_grid,
    "training": _conditions.check_training,
    "loudness": _conditions.check_loudness,
}


def check_mixer(
    mixer: str | type[Mixer],
    /,
    dim: int = 16,
    checks: Iterable[str] | None = None,
    device: str = "cpu",
    inductor: bool = False,
    **arguments: Any,
) -> dict[str, str]:
    """Check that a mixer keeps the contract of `Mixer`.

    Args:
        mixer: A registered name, "package.module:Class", or a `Mixer` class.
        dim: Channels D.
        checks: Which of `MIXER_CHECKS`; None: all.
        device: Where they run: "cpu", "cuda".
        inductor: Whether "compile" also runs torch.compile's own backend, which needs a C++ compiler and a minute.
        arguments: The mixer's own.

    Returns:
        Each check's result: "passed", or "skipped: " and why it does not apply here.

    Raises:
        AssertionError: with every promise that does not hold, one a line.
        ValueError: unknown check, or arguments that the mixer refuses.
    """
    subject = Subject(mixer, dim, arguments, device)
    with seeded(0):
        subject.make()
    results, failures = {}, []
    for name in MIXER_CHECKS if checks is None else checks:
        if name not in MIXER_CHECKS:
            raise ValueError(f"unknown check {name!r}{suggest(name, MIXER_CHECKS)}")
        check = MIXER_CHECKS[name]
        try:
            check(subject)
            if name == "compile" and inductor:
                _checks.check_compile(subject, "inductor")
            results[name] = "passed"
        except Skip as reason:
            results[name] = f"skipped: {reason}"
        except Exception as error:  # whatever a mixer raises is a broken promise of that mixer
            what = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            contract = inspect.getdoc(check) or "(a docstring, which python -OO strips)"
            failures.append((name, f"{name}: {what}\n    the contract: {contract}", error))
    if failures:
        lines = "\n  ".join(text for _, text, _ in failures)
        raise AssertionError(f"{subject} breaks {len(failures)} promise(s):\n  {lines}") from failures[0][2]
    return results
