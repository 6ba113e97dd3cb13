"""The shapes causal_conv1d is tested and timed at, each with the reason it is there."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One shape: x (batch, length, dim), weight (dim, width)."""

    batch: int
    length: int
    dim: int
    width: int
    reason: str


TESTED = (
    Case(2, 70, 33, 4, "two work items a sequence, channels beside every SIMD width"),
    Case(1, 200, 8, 4, "four work items of one sequence"),
    Case(3, 2, 16, 4, "shorter than the filter: the final state keeps rows of the initial one"),
    Case(2, 1, 5, 4, "one step, as in decoding"),
    Case(2, 9, 7, 1, "no memory: a state without rows"),
    Case(2, 13, 6, 2, "the shortest filter with a memory"),
    Case(1, 65, 3, 3, "odd filter, one position more than a work item has"),
    Case(1, 80, 4, 8, "long filter"),
    Case(2, 1, 1, 9, "one channel, all but one input from the state"),
)

TIMED = (
    Case(2, 1024, 512, 4, "a small language model: dim 256, expanded by 2"),
    Case(64, 65, 384, 4, "vim_tiny on 32 x 32 pixels: 64 patches and a class token"),
    Case(128, 197, 384, 4, "vim_tiny on 224 x 224 pixels"),
)
