"""Whole causal models on the CPU beside transformers': equal logits first, then the time of a training step.

    python benchmarks/cpu_models.py                 # minutes: transformers' default path at L = 128 only
    python benchmarks/cpu_models.py --full          # its default path at L = 1024 too, a step of several minutes

Both models have 256 channels, 4 layers and 256 tokens of vocabulary; ours takes over the random weights of theirs.
Needs transformers and mambapy: `pip install '.[bench]'`.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from peers import missing
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mambaverse.backbones.isotropic import Isotropic

VOCABULARY, DIM, DEPTH = 256, 256, 4


class CausalModel(nn.Module):
    """Embedding -> causal stack of one mixer -> logits."""

    def __init__(self, mixer: str, **mixer_args: int) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(VOCABULARY, DIM)
        self.backbone = Isotropic(DIM, DEPTH, mixer, {mixer: mixer_args}, causal=True)
        self.lm_head = nn.Linear(DIM, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.backbone(self.embeddings(tokens)))

    def load_transformers(self, model: nn.Module) -> None:
        weights = {key.replace("backbone.embeddings", "embeddings"): value for key, value in model.state_dict().items()}
        self.load_state_dict(weights)


def step_seconds(logits: Callable[[Tensor], Tensor], model: nn.Module, tokens: Tensor, repeat: int) -> float:
    """Return the least time in seconds of forward, loss and backward."""
    times = []
    for _ in range(repeat):
        model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        F.cross_entropy(logits(tokens).flatten(0, 1), tokens.flatten()).backward()
        times.append(time.perf_counter() - start)
    return min(times)


def s6(length: int, batch: int, repeat: int, full: bool, table: Table) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=DIM, num_hidden_layers=DEPTH, use_mambapy=True)
    theirs = MambaForCausalLM(config).train()
    ours = CausalModel("s6").train()
    ours.load_transformers(theirs)
    tokens = torch.randint(VOCABULARY, (batch, length))
    with torch.no_grad():
        error = (ours(tokens) - theirs(tokens).logits).abs().max().item()
    ours_s = step_seconds(ours, ours, tokens, repeat)
    theirs_s = step_seconds(lambda t: theirs(t).logits, theirs, tokens, max(2, repeat // 3))
    add_row(table, "S6", "MambaForCausalLM, use_mambapy", batch, length, ours_s, theirs_s, error)
    if full or length <= 128:
        for module in theirs.modules():
            if hasattr(module, "use_mambapy"):
                module.use_mambapy = False
        theirs_s = step_seconds(lambda t: theirs(t).logits, theirs, tokens, 1)
        add_row(table, "S6", "MambaForCausalLM, default", batch, length, ours_s, theirs_s, error)


def ssd(length: int, batch: int, repeat: int, table: Table) -> None:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=DIM, num_hidden_layers=DEPTH, num_heads=8, head_dim=64, state_size=64,
        n_groups=1,
    )  # fmt: skip
    theirs = Mamba2ForCausalLM(config).train()
    ours = CausalModel("ssd", d_state=64, headdim=64).train()
    ours.load_transformers(theirs)
    tokens = torch.randint(VOCABULARY, (batch, length))
    with torch.no_grad():
        error = (ours(tokens) - theirs(tokens).logits).abs().max().item()
    ours_s = step_seconds(ours, ours, tokens, repeat)
    theirs_s = step_seconds(lambda t: theirs(t).logits, theirs, tokens, max(2, repeat // 2))
    add_row(table, "SSD", "Mamba2ForCausalLM", batch, length, ours_s, theirs_s, error)


def add_row(
    table: Table, model: str, peer: str, batch: int, length: int, ours_s: float, theirs_s: float, error: float
) -> None:
    assert error < 1e-4, f"{model}: logits differ by {error:.1e}"
    shape = f"{batch}, {length}"
    table.add_row(model, shape, f"{ours_s:.3f}", peer, f"{theirs_s:.3f}", f"{theirs_s / ours_s:.1f}x", f"{error:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="transformers' default path at L = 1024 too")
    parser.add_argument("--repeat", type=int, default=10)
    arguments = parser.parse_args()
    if without := missing("transformers", "mambapy"):
        sys.exit(f"nothing to time ours beside: {without}")
    import transformers

    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    title = f"training step, {torch.get_num_threads()} threads, {platform.machine()}, {versions}"
    table = Table("model", "B, L", "ours, s", "peer", "theirs, s", "ratio", "logits, max |Δ|", title=title)
    s6(128, 2, arguments.repeat, True, table)
    s6(1024, 2, arguments.repeat, arguments.full, table)
    ssd(1024, 2, arguments.repeat, table)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
