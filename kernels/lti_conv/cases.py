"""The shapes lti_conv is tested and timed at, each with the reason it is there."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One shape: u (batch, length, dim), A (dim, num_states)."""

    batch: int
    length: int
    dim: int
    num_states: int
    reason: str


TESTED = (
    Case(2, 70, 33, 5, "channels beside the 16 of a work item, length beside the four steps of a load"),
    Case(40, 4, 2, 3, "more sequences than groups of partial sums, exactly four steps"),
    Case(3, 7, 16, 1, "one state, one full block of channels"),
    Case(2, 1, 5, 4, "one step, as in decoding"),
    Case(1, 3, 1, 2, "one channel, shorter than a load"),
)

LONG = (
    Case(1, 1024, 8, 32, "usual S4D: 64 states of which 32 are kept, phases up to 10 radians a step"),
    Case(1, 8192, 8, 32, "phases that wind 80000 radians"),
)

TIMED = (
    Case(2, 1024, 512, 32, "a small language model with S4D's default of 64 states"),
    Case(64, 65, 192, 32, "vim_tiny's tokens on 32 x 32 pixels"),
    Case(4, 1024, 256, 8, "few states, where the recurrence gains most on the FFT"),
    Case(2, 8192, 64, 32, "long sequences, where the FFT gains"),
)
