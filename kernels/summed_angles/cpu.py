"""The angles of Mamba-3 on the CPU: the reference's passes, which are those of a mixer in plain PyTorch."""

from mambaverse.kernels.summed_angles.reference import backward, forward

__all__ = ["backward", "forward"]
