"""The model of a run: built from the `model` section of its config, and told how to save memory."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from mambaverse.config import ConfigError, ModelConfig, RunConfig
from mambaverse.ensemble import Ensemble, members_of
from mambaverse.errors import UserError
from mambaverse.models import create_model

DECIDED = {  # arguments of a model that have keys of their own
    "mixer": "set model.mixer",
    "mixer_args": "set model.mixer_args",
    "directions": "set model.directions",
    "device": "set trainer.device",
    "dtype": "set trainer.precision",
}


def build_model(model: ModelConfig, arguments: Mapping[str, Any], decided: Mapping[str, str]) -> nn.Module:
    """Return the model that `model` names, without its `checkpoint`; with `members` an `Ensemble` of them.

    Args:
        model: The section of the config.
        arguments: Of the factory, that follow from the data and the task.
        decided: Arguments that cannot be set in `model.args`, each with what to do instead.

    Raises:
        ConfigError: `model.args` sets one of those.
        UserError: unknown model or argument, or options that do not fit each other.
    """
    for key in model.args:
        if key in decided:
            raise ConfigError(f"model.args.{key} cannot be set: {decided[key]}")
    chosen = {
        "mixer": model.mixer,
        "mixer_args": model.mixer_args or None,
        "directions": model.directions,
        **model.args,  # model.args.patch_size=null takes out what a config has set
    }
    overrides = {key: value for key, value in chosen.items() if value is not None} | dict(arguments)
    members = [create_model(model.name, **overrides) for _ in range(model.members)]
    return Ensemble(members) if len(members) > 1 else members[0]


def set_checkpointing(model: nn.Module, config: RunConfig) -> None:
    """Have `model` recompute activations in backward, as `trainer.grad_checkpointing` and `checkpoint_chunk` say.

    Args:
        model: Any, or an `Ensemble`; it needs a method `set_grad_checkpointing(enable)`, as timm's models have it, and
            for chunks one that takes `chunk_size` too.
        config: Of the run.

    Raises:
        ConfigError: a model without it.
        UserError: a model that cannot be run on from a state, in chunks.
    """
    chunk = config.trainer.checkpoint_chunk
    if not config.trainer.grad_checkpointing:
        return
    for member in members_of(model):
        switch = getattr(member, "set_grad_checkpointing", None)
        if switch is None:
            raise ConfigError(
                f"trainer.grad_checkpointing: the model {config.model.name} keeps its activations: it has no "
                "set_grad_checkpointing; set it to false, or data.batch_size smaller"
            )
        if chunk is None:
            switch(True)
        elif "chunk_size" in inspect.signature(switch).parameters:
            try:
                switch(True, chunk_size=chunk)
            except UserError as error:
                what = f"trainer.checkpoint_chunk: the model {config.model.name}"
                raise UserError(f"{what}: {error}; leave it out to checkpoint block by block") from None
        else:
            raise ConfigError(
                f"trainer.checkpoint_chunk: the model {config.model.name} is not trained in chunks of a sequence; "
                "causal models of DNA are; leave it out to checkpoint block by block"
            )
