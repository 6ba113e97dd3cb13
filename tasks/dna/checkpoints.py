"""Weights files for the DNA models: those of Caduceus and of Mamba, and our own.

    theirs                                                          ours
    embeddings.word_embeddings.[embedding.]weight   (Caduceus)      embeddings.word_embeddings.weight
    embedding.weight (mamba_ssm), embeddings.weight (transformers)
    layers.i.norm.[submodule.]weight, norm_f.[submodule.]weight     layers.i.norm.weight, norm_f.weight
    layers.i.mixer.[submodule.]mamba_fwd.X                          layers.i.mixer.X      vim: A_log, conv1d.weight
                                                                    layers.i.mixer.fwd.X  bidirectional
    layers.i.mixer.[submodule.]mamba_rev.X                          layers.i.mixer.X_b    vim: A_b_log, conv1d_b.weight
                                                                    layers.i.mixer.bwd.X  bidirectional
    lm_head.[lm_head.]weight                                        the embedding, or lm_head.weight
    score.weight                                                    score.weight

`[submodule.]`, `[embedding.]` and `[lm_head.]` are PS's. Before all of them may stand `model.` (in Lightning's .ckpt,
whose weights are under "state_dict"; all else in it is left alone), `caduceus.`, `backbone.` or `module.`. Of tensors
under two names, tied ones, safetensors keep one; the other is filled in.

PS files come in two kinds, told apart by their keys: with `fused_add_norm=True`, as all that were published, the norms
of the layers are `norm.weight`, else `norm.submodule.weight`. The first compute what `rcps_swap_halves` does here (see
strands.py). That the weights on the hub need it follows from the code beside them; with the weights themselves it was
not measured.
"""

from __future__ import annotations

import collections
import json
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig
from omegaconf.base import ContainerMetadata, Metadata
from omegaconf.nodes import AnyNode
from torch import Tensor, nn

from mambaverse.engine.checkpoint import CheckpointError, load_state, load_weights, read_weights
from mambaverse.errors import warn
from mambaverse.mixers.bidirectional import Bidirectional
from mambaverse.mixers.s6 import S6
from mambaverse.mixers.vim import Vim
from mambaverse.tasks.dna.backbone import DnaModel
from mambaverse.tasks.dna.heads import LANGUAGE
from mambaverse.tasks.dna.tokens import COMPLEMENT, VOCAB_SIZE

# What Lightning keeps of a run's configuration is read, to get past it, and never looked at.
LIGHTNING: list[Any] = [
    *(DictConfig, ListConfig, ContainerMetadata, Metadata, AnyNode),
    *(typing.Any, collections.defaultdict, dict, list, int),
]
IN_FOLDERS = ("model.safetensors", "pytorch_model.bin")  # of what `save_pretrained` writes
EMBEDDING, LM_HEAD, SWAP = "embeddings.word_embeddings.weight", "lm_head.weight", "rcps_swap_halves"
BODY = ("embeddings.", "layers.", "norm_f.", "pos_embed")  # all else is of a head
PROJECTIONS = tuple(f"{side}_proj.{kind}" for side in ("in", "out") for kind in ("weight", "bias"))  # tied ones
_PREFIXES = re.compile(r"^(?:(?:_orig_mod|module|model|caduceus|backbone)\.)+")
_DIRECTION = re.compile(r"^layers\.(\d+)\.mixer\.mamba_(fwd|rev)\.(.+)$")
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^(layers\.\d+\.(?:norm|mixer)|norm_f)\.submodule\.", r"\1."),
        (r"^embeddings\.word_embeddings\.embedding\.", "embeddings.word_embeddings."),
        (r"^embeddings?\.weight$", EMBEDDING),
        (r"^lm_head\.lm_head\.", "lm_head."),
    )
]


@dataclass(frozen=True)
class DnaWeights:
    """What a file holds.

    Attributes:
        source: The file, for messages.
        kind: "Caduceus-PS", "Caduceus", or "": ours, and Mamba's, whose mixers have our names.
        swaps: Whether the strands change places before every block (`rcps_swap_halves`).
        merge: How the file's two directions become one: "add" or "ew_multiply".
        weights: Under our names but for those of the two directions, which depend on the mixer.
    """

    source: str
    kind: str
    swaps: bool
    merge: str
    weights: dict[str, Tensor]


def read_checkpoint(path: Path | str) -> DnaWeights:
    """Read a weights file, or a folder as `save_pretrained` writes it.

    Args:
        path: Safetensors, or what torch.save wrote: a state dict, or one under "state_dict" (Lightning) or "model". A
            `config.json` beside it says whether the directions are multiplied rather than added.

    Raises:
        CheckpointError: no such file, damaged, runs code, or of another alphabet.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in IN_FOLDERS if (path / name).is_file()]
        if not found:
            raise CheckpointError(f"{path}: a folder without {' or '.join(IN_FOLDERS)}; name the weights file")
        path = found[0]
    with torch.serialization.safe_globals(LIGHTNING):
        raw = {_PREFIXES.sub("", name): value for name, value in read_weights(path).items()}
    source = str(path)
    is_ps = any(".submodule." in name or name.endswith("complement_map") for name in raw)
    fused = is_ps and any(re.fullmatch(r"layers\.\d+\.norm\.weight", name) for name in raw)
    weights: dict[str, Tensor] = {}
    for name, value in raw.items():
        if not name.endswith("complement_map"):
            for pattern, replacement in _RULES:
                name = pattern.sub(replacement, name)
            weights[name] = value
        elif value.tolist() != COMPLEMENT.tolist():
            raise CheckpointError(f"{source}: {name} {value.tolist()}, expected {COMPLEMENT.tolist()}")
    swaps = weights.pop(SWAP, None) is not None or fused
    _fill_in_tied(weights)
    is_theirs = any(map(_DIRECTION.match, weights))
    kind = "Caduceus-PS" if is_ps else "Caduceus" if is_theirs else ""
    return DnaWeights(source, kind, swaps, _merge(path) if is_theirs else "add", weights)


def start_from(model: nn.Module, path: Path) -> None:
    """Start a run's model from a weights file: ours, or where it is a `DnaModel` of Caduceus or of Mamba.

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    if isinstance(model, DnaModel):
        load_checkpoint(model, read_checkpoint(path))
    else:
        load_weights(model, path)


def load_checkpoint(model: DnaModel, file: DnaWeights, *, swap_as_built: bool = False) -> None:
    """Copy the weights of `file` into `model`, or change nothing and raise.

    A head that the file lacks, or has for other classes, starts anew; the head that a language model was pretrained
    with is left out where the model has another. If so, one line says what was taken over and what was not.

    Args:
        model: Of the file's sizes, of any head.
        file: From `read_checkpoint`.
        swap_as_built: Keep to the model's `rcps_swap_halves`, whatever the file says.

    Raises:
        CheckpointError: weights of another model, by name; mixers that cannot hold them.
    """
    _check_sizes(model, file)
    _check_strands(model, file, swap_as_built)
    weights = _for_mixers(model, file)
    own, score = model.state_dict(), "score.weight"
    said = _fit_language_head(model, weights, file.source)
    if score in weights and score in own and weights[score].shape != own[score].shape:
        size = len(weights[score])
        said.append(f"its head has {size} outputs and is left out; that of {model.num_classes} starts anew")
        weights |= {name: value for name, value in own.items() if name.startswith("score.")}
    if SWAP in own:
        weights[SWAP] = own[SWAP]
    extra = [name for name in weights if name not in own and not name.startswith(BODY) and _is_of_a_head(name)]
    if extra:
        said.append(f"{', '.join(extra)} are of another head and left out")
    anew = [name for name in own if name not in weights and not name.startswith(BODY)]
    if anew:
        said.append(f"holds no {', '.join(anew)}; they start anew")
    kept = {name: value for name, value in weights.items() if name not in extra}
    load_state(model, kept | {name: own[name] for name in anew}, file.source)
    if said:
        body = sorted({name.partition(".")[0] for name in kept if name.startswith(BODY)})
        count = sum(name.startswith(BODY) for name in kept)
        warn(f"{file.source}: {'; '.join(said)}; {count} tensors taken over ({', '.join(body)})")


def _fill_in_tied(weights: dict[str, Tensor]) -> None:
    """Give both names back to what the two directions, or embedding and head, share."""
    for name in [name for name in weights if _DIRECTION.match(name)]:
        front, _, parameter = name.partition(".mamba_fwd." if ".mamba_fwd." in name else ".mamba_rev.")
        sides = [f"{front}.mamba_{side}" for side in ("fwd", "rev")]
        if parameter in PROJECTIONS and all(f"{side}.A_log" in weights for side in sides):
            for side in sides:
                weights.setdefault(f"{side}.{parameter}", weights[name])
    if EMBEDDING not in weights and LM_HEAD in weights:
        weights[EMBEDDING] = weights[LM_HEAD]


def _merge(path: Path) -> str:
    """Return how the directions are merged, as the config beside the weights says; "add" where there is none."""
    config = path.parent / "config.json"
    if not config.is_file():
        return "add"
    try:
        content = json.loads(config.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{config}: not the JSON that is expected beside weights: {error}") from None
    return str((content.get("bidirectional_strategy") if isinstance(content, dict) else None) or "add")


def _check_sizes(model: DnaModel, file: DnaWeights) -> None:
    table = file.weights.get(EMBEDDING)
    stem = [name for name in file.weights if name.startswith("embeddings.")]
    by_base = bool(file.kind) or (stem == [EMBEDDING] and len(file.weights[EMBEDDING]) == VOCAB_SIZE)
    if by_base and model.stem != "embedding":
        raise CheckpointError(
            f"{file.source}: weights of {file.kind or 'a model'}, which reads base by base; the model has "
            f"stem={model.stem!r}: set stem='embedding' with stem_stride=1, in a config "
            "model.args.stem=embedding model.args.stem_stride=1"
        )
    if table is None or table.ndim != 2 or model.stem != "embedding":
        return  # load_state names what differs
    if len(table) != VOCAB_SIZE:
        raise CheckpointError(f"{file.source}: an alphabet of {len(table)} ids, expected {VOCAB_SIZE} (see tokens.py)")
    numbers = [int(found[1]) for name in file.weights if (found := re.match(r"layers\.(\d+)\.", name))]
    dim, depth = table.shape[1], max(numbers, default=-1) + 1
    if (dim, depth) != (model.dim, model.depth):
        family = {"Caduceus-PS": "caduceus_ps", "Caduceus": "caduceus_ph"}.get(file.kind)
        name = f"{family}_d{dim}_n{depth}, or " if family else ""
        raise CheckpointError(
            f"{file.source}: weights of {dim} channels and {depth} layers, the model has {model.dim} and "
            f"{model.depth}; build {name}a model with dim={dim}, depth={depth}"
        )


def _check_strands(model: DnaModel, file: DnaWeights, swap_as_built: bool) -> None:
    swaps = model.rcps_swap_halves is not None
    if file.kind == "Caduceus-PS" and not model.both_strands:
        raise CheckpointError(f"{file.source}: weights of Caduceus-PS; build caduceus_ps_*, or set both_strands=True")
    if file.kind == "Caduceus" and model.both_strands:
        warn(f"{file.source}: weights of Caduceus-Ph, read on both strands: this is post-hoc conjoining")
    if file.swaps and not swaps and not swap_as_built:
        raise CheckpointError(
            f"{file.source}: its strands change places before every layer (a fused Caduceus-PS); build the model with "
            "rcps_swap_halves=True, in a config model.args.rcps_swap_halves=true"
        )
    if swaps != file.swaps:
        is_set, said = ("set", "not made") if swaps else ("not set", "made")
        warn(
            f"{file.source}: rcps_swap_halves is {is_set}, but the file was {said} with it; the model is used as built"
        )


def _for_mixers(model: DnaModel, file: DnaWeights) -> dict[str, Tensor]:
    """Return the weights with the parameters of the two directions under the names of the model's mixers."""
    blocks = model.blocks()
    weights: dict[str, Tensor] = {}
    for name, value in file.weights.items():
        found = _DIRECTION.match(name)
        if found is None or int(found[1]) >= len(blocks):  # load_state names a layer too many
            weights[name] = value
            continue
        layer, side, parameter = int(found[1]), found[2], found[3]
        mixer, where = blocks[layer].mixer, f"layers.{layer}.mixer"
        if isinstance(mixer, Vim) and not mixer.shared:
            _check_merge(mixer.merge, file)
            if side == "rev" and parameter in PROJECTIONS:
                _check_tied(value, file.weights.get(name.replace("mamba_rev", "mamba_fwd"), value), name, file.source)
            else:
                weights[f"{where}.{parameter if side == 'fwd' else _backward(parameter)}"] = value
        elif isinstance(mixer, Bidirectional) and isinstance(mixer.fwd, S6):
            _check_merge(mixer.merge, file)
            weights[f"{where}.{'fwd' if side == 'fwd' else 'bwd'}.{parameter}"] = value
        elif isinstance(mixer, S6) and not any(".mamba_rev." in other for other in file.weights):
            weights[f"{where}.{parameter}"] = value
        else:
            raise CheckpointError(
                f"{file.source}: weights of Mamba in {'two directions' if side == 'rev' else 'Caduceus'}, which "
                f"{type(mixer).__name__} in layer {layer} cannot hold; build the model with mixer='vim' (tied "
                "projections) or mixer='s6' (a Mamba for each direction)"
            )
    return weights


def _backward(parameter: str) -> str:
    """Return vim's name of a parameter of the backward direction: A_b_log for A_log, conv1d_b.weight, ..."""
    if parameter == "A_log":
        return "A_b_log"
    module, dot, rest = parameter.partition(".")
    return f"{module}_b{dot}{rest}"


def _check_merge(merge: str, file: DnaWeights) -> None:
    if merge != file.merge:
        remedy = "set mixer='s6' and " if file.merge != "add" else ""  # vim cannot multiply
        remedy += f"the mixer's argument merge={file.merge!r} (mixer_args)"
        raise CheckpointError(f"{file.source}: directions merged by {file.merge!r}, the model's by {merge!r}; {remedy}")


def _check_tied(backward: Tensor, forward: Tensor, name: str, source: str) -> None:
    if backward.shape != forward.shape or not torch.equal(backward, forward):
        raise CheckpointError(
            f"{source}: untied weights ({name} is not that of mamba_fwd), but mixer 'vim' has one projection for both "
            "directions; build the model with mixer='s6', which gives each direction its own"
        )


def _fit_language_head(model: DnaModel, weights: dict[str, Tensor], source: str) -> list[str]:
    """Check, fill in or leave out `lm_head.weight`; returns what there is to say of it."""
    if model.lm_head is not None:
        if EMBEDDING in weights:
            weights.setdefault(LM_HEAD, weights[EMBEDDING])
        return []
    head = weights.pop(LM_HEAD, None)
    if head is None or torch.equal(head, weights[EMBEDDING]):
        return []
    if model.head in LANGUAGE:
        raise CheckpointError(
            f"{source}: lm_head.weight is not the embedding; build the model with tie_embeddings=False, which holds it"
        )
    return [f"{LM_HEAD} is of another head and left out"]


def _is_of_a_head(name: str) -> bool:
    return name.startswith(("score.", "cls_token", "place_weight", "attention_pool.", "wide."))
