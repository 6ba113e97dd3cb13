"""The step sizes of Mamba-3 on the CPU: the reference's passes, a few numbers a token and head."""

from mambaverse.kernels.trapezoid_weights.reference import backward, forward

__all__ = ["backward", "forward"]
