"""Non-causal SSD on the CPU: the reference's matrix products, which are all there is to it."""

from mambaverse.kernels.nc_ssd.reference import backward, forward

__all__ = ["backward", "forward"]
