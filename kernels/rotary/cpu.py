"""Rotary positions on the CPU: the reference's passes."""

from mambaverse.kernels.rotary.reference import forward

__all__ = ["forward"]
