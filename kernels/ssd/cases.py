"""The shapes ssd is tested and timed at, each with the reason it is there."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One shape: x (batch, length, heads, head_dim), B and C (batch, length, groups, state_dim)."""

    batch: int
    length: int
    heads: int
    head_dim: int
    groups: int
    state_dim: int
    reason: str


TESTED = (
    Case(2, 70, 4, 16, 2, 16, "two chunks of 35, two heads a group"),
    Case(1, 64, 2, 64, 1, 64, "one full chunk at the usual sizes: no state is carried"),
    Case(2, 1, 3, 5, 3, 7, "one step, as in decoding; as many groups as heads; beside every SIMD width"),
    Case(1, 131, 2, 33, 1, 20, "three chunks, the last shorter; one column more than two registers"),
    Case(3, 17, 6, 8, 2, 48, "states wider than heads, one position more than a padded tile"),
    Case(1, 130, 1, 1, 1, 1, "one scalar recurrence"),
)

TIMED = (
    Case(2, 1024, 8, 64, 1, 64, "a small language model: dim 256, expanded by 2"),
    Case(64, 65, 6, 64, 1, 64, "vision, 32 x 32 pixels: 64 patches and a class token, dim 192 expanded by 2"),
    Case(16, 197, 12, 64, 1, 64, "vision, 224 x 224 pixels: 196 patches and a class token, dim 384 expanded by 2"),
    Case(1, 2048, 24, 64, 1, 128, "the sizes of Mamba-2 130M"),
    Case(2, 1024, 8, 16, 1, 16, "small heads and states"),
)
