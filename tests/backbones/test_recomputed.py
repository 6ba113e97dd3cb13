"""What backward works out again runs on the backend of forward, wherever backward is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mambaverse
from mambaverse.kernels import backend

MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "isotropic": ("dna_mamba_d64_n2", {"head": "causal_lm", "mixer": "ssd", "dim": 16}, {}),
    "chunks": ("dna_mamba_d64_n2", {"head": "causal_lm", "mixer": "ssd", "dim": 16}, {"chunk_size": 5}),
    "vision": ("vim_nano_patch4_32", {"depth": 2, "mixer": "s6", "img_size": 16}, {}),
    "hierarchical": ("strata_nano_patch4_32", {"depths": [1]}, {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_worked_out_again_on_the_backend_of_forward(name: str, loads: list[tuple[str, str]]) -> None:
    model_name, arguments, checkpointing = MODELS[name]
    model: Any = mambaverse.create_model(model_name, **arguments).train()
    x = torch.randint(4, (1, 12)) if "dna" in model_name else torch.randn(1, 3, *[arguments.get("img_size", 32)] * 2)
    model.set_grad_checkpointing(**checkpointing)
    with backend.use_backend("reference"):
        y = model(x)
    forward = len(loads)
    loss = y.square().mean()
    loss.backward(retain_graph=True)
    loss.backward()
    assert len(loads) > 3 * forward > 0 and {chosen for _, chosen in loads} == {"reference"}
