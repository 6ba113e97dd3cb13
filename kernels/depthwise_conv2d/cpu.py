"""The depthwise convolution of a grid on the CPU: torch's, which is well kept and fast there."""

from mambaverse.kernels.depthwise_conv2d.aten import backward, forward

__all__ = ["backward", "forward"]
