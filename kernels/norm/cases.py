"""The shapes the norms are tested and timed at, each with the reason it is there."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One shape: x is `shape`, its last axis D; `group_size` divides D."""

    shape: tuple[int, ...]
    group_size: int
    reason: str


TESTED = (
    Case((2, 70, 33), 11, "more than two blocks of 64 rows, channels beside every SIMD width, three groups"),
    Case((65, 64), 16, "one row more than a block"),
    Case((1, 1, 96), 96, "one token, as in decoding"),
    Case((7,), 7, "no axis but the channels"),
    Case((2, 3, 2, 5), 1, "four axes; groups of one"),
    Case((3, 1), 1, "one channel"),
)

TIMED = (
    Case((2048, 256), 256, "a small language model: 2 x 1024 tokens"),
    Case((64 * 65, 192), 192, "vim_tiny on 32 x 32 pixels, batch 64"),
    Case((25216, 192), 192, "vim_tiny on 224 x 224 pixels, batch 128"),
)
