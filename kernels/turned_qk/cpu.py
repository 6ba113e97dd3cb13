"""Keys and queries of Mamba-3 on the CPU: the reference's passes, which are those of a mixer in plain PyTorch.

They are bound by memory and run on all of torch's threads; the scan that follows takes longer.
"""

from mambaverse.kernels.turned_qk.reference import backward, forward

__all__ = ["backward", "forward"]
