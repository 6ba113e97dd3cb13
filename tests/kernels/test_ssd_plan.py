"""What `ssd` loads ahead on a GPU, by sizes alone."""

from dataclasses import replace

import pytest

pytest.importorskip("triton")

import torch

from mambaverse.kernels.launch import AHEAD_BYTES
from mambaverse.kernels.ssd.layout import TRITON_COLUMNS, TRITON_KEEP
from mambaverse.kernels.ssd.triton_plan import INTERPRETED, WALK_BYTES, Plan, tuning

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter has one plan")
LM = Plan(8, 2048, 32, 1, 64, 128, 8, packed=False, dtype=torch.bfloat16, ahead=True)


@pytest.mark.parametrize(("states", "stages"), [(16, 3), (64, 3), (100, 3), (128, 3), (200, 2), (256, 2)])
def test_a_head_or_two_is_loaded_ahead_where_it_fits(states, stages):
    p = replace(LM, state_dim=states)
    chunk, warps, actual = tuning("gradient_BC", p)
    assert actual == stages
    columns, states = p.tile
    each = 2 * (2 * chunk * columns + 2 * columns * states)  # bfloat16: x, dy; the state before, the gradient after
    scratch = 2 * chunk * (columns + states) + 4 * chunk * chunk
    assert (stages - 1) * each + scratch <= AHEAD_BYTES
    assert warps in (4, 8)


@pytest.mark.parametrize(
    "change",
    [{"ahead": False}, {"head_dim": 128}, {"dtype": torch.float32}, {"dtype": torch.float16}, {"groups": 32}],
    ids=["little shared memory", "two tiles a head", "float32", "float16", "one head a program"],
)
def test_nothing_is_loaded_ahead_elsewhere(change):
    assert tuning("gradient_BC", replace(LM, **change))[2] == 1


@pytest.mark.parametrize("states", [16, 64, 100, 128])
def test_what_walked_kernels_load_ahead_fits(states):
    p = replace(LM, state_dim=states, walks=True)
    columns, states = p.tile
    chunk, _, stages = tuning("through_states", p)
    each = 2 * (2 * chunk * columns + 2 * columns * states)  # as above
    assert (stages - 1) * each + 2 * chunk * (columns + 3 * states) + 4 * chunk * chunk <= WALK_BYTES
    chunk, _, stages = tuning("walk", p)
    each = 2 * (chunk * columns + 2 * chunk * states)  # dy, B, C
    assert 2 * (stages * each + 2 * columns * states) <= WALK_BYTES + 2**15  # two programs on a multiprocessor


def test_a_row_that_walked_kernels_leave_holds_a_number_a_position_or_a_column():
    assert TRITON_COLUMNS == TRITON_KEEP


def test_nothing_is_loaded_ahead_beside_states_that_are_given():
    assert tuning("gradient_BC", LM, ends=True)[2] == 1


def test_many_states_are_walked_in_shorter_chunks_where_shared_memory_is_little():
    p = replace(LM, state_dim=256)
    assert tuning("scan", p)[0] == 2 * tuning("scan", replace(p, ahead=False))[0] == 64
