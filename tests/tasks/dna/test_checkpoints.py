"""Weights of Caduceus and Mamba under their original names give what the plain reference gives; others are refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor

import mambaverse
from mambaverse.engine.checkpoint import CheckpointError
from mambaverse.tasks.dna.tokens import A, N
from tests.tasks.dna.caduceus_reference import as_saved, class_scores, hidden, logits, make_weights
from tests.tasks.dna.conftest import Make

DIM, DEPTH = 16, 3
KINDS = {"ph": (False, False), "ph_fused": (False, True), "ps": (True, False), "ps_fused": (True, True)}


def theirs(kind: str, **more: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    rcps, fused = KINDS[kind]
    return make_weights(DIM, DEPTH, rcps=rcps, fused=fused, **more)


def build(kind: str, path: Path, **overrides: Any) -> Any:
    name = f"caduceus_{kind[:2]}_d32_n2"
    arguments = {"dim": DIM, "depth": DEPTH, "head": "mlm", "checkpoint_path": path, **overrides}
    return mambaverse.create_model(name, **arguments).eval()


def saved(path: Path, weights: dict[str, Any]) -> Path:
    torch.save(weights, path)
    return path


def as_fused(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {re.sub(r"(norm|norm_f)\.submodule", r"\1", name): value for name, value in weights.items()}


def batch() -> Tensor:
    return torch.randint(A, N + 1, (2, 11), generator=torch.Generator().manual_seed(0))


def close(here: Tensor, there: Tensor) -> None:
    assert there.std() > 0.1
    torch.testing.assert_close(here, there, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_reference(kind: str, tmp_path: Path) -> None:
    (rcps, fused), weights = KINDS[kind], theirs(kind)
    model = build(kind, saved(tmp_path / "pytorch_model.bin", as_saved(weights, rcps=rcps)))
    with torch.no_grad():
        close(model(batch()), logits(weights, batch(), rcps=rcps, fused=fused))
        close(model.forward_features(batch()), hidden(weights, batch(), rcps=rcps, fused=fused))
        lengths = torch.tensor([11, 5])  # packed, where the strands change places too
        close(model(batch(), lengths)[1, :5], logits(weights, batch()[1:, :5], rcps=rcps, fused=fused)[0])
    assert (model.rcps_swap_halves is not None) == (kind == "ps_fused")


@pytest.mark.parametrize("kind", KINDS)
def test_class_scores_are_those_of_the_reference(kind: str, tmp_path: Path) -> None:
    (rcps, fused), weights = KINDS[kind], theirs(kind)
    score = torch.randn(3, DIM)
    path = saved(tmp_path / "w.pt", as_saved(weights, rcps=rcps) | {"score.weight": score})
    model = build(kind, path, head="classifier", num_classes=3)
    with torch.no_grad():
        close(model(batch()), class_scores(weights, score, batch(), rcps=rcps, fused=fused))


def test_the_two_kinds_of_ps_are_two_functions_of_the_same_weights() -> None:
    weights = theirs("ps")
    other = {
        name.replace("norm.submodule", "norm").replace("norm_f.submodule", "norm_f"): v for name, v in weights.items()
    }
    gap = logits(weights, batch(), rcps=True, fused=False) - logits(other, batch(), rcps=True, fused=True)
    assert gap.abs().max() > 0.5


@pytest.mark.parametrize("kind", ["ph", "ps_fused"])
@pytest.mark.parametrize("missing", ["mamba_fwd", "mamba_rev"])
@pytest.mark.parametrize("drop_head", [True, False])
def test_safetensors_may_lack_either_name_of_a_tied_tensor(
    kind: str, missing: str, drop_head: bool, tmp_path: Path
) -> None:
    rcps, fused = KINDS[kind]
    weights = theirs(kind)
    kept = as_saved(weights, rcps=rcps)
    gone = [n for n in kept if f"{missing}.in_proj" in n or f"{missing}.out_proj" in n or "complement_map" in n]
    gone += [n for n in kept if (n.startswith("lm_head") if drop_head else re.search(r"word_embeddings.*weight$", n))]
    save_file({n: v.clone() for n, v in kept.items() if n not in gone}, tmp_path / "model.safetensors")
    with torch.no_grad():  # the folder is what save_pretrained writes
        close(build(kind, tmp_path)(batch()), logits(weights, batch(), rcps=rcps, fused=fused))


@pytest.mark.parametrize("kind", ["ph", "ps_fused"])
def test_lightnings_files_are_read_for_their_weights(kind: str, tmp_path: Path) -> None:
    rcps, fused = KINDS[kind]
    weights = theirs(kind)
    content = {
        "state_dict": {f"model.{name}": value for name, value in as_saved(weights, rcps=rcps).items()},
        "hyper_parameters": OmegaConf.create({"model": {"d_model": DIM, "layers": [1, 2.5, None]}, "name": "x"}),
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3}]}],
        "epoch": 1,
    }
    with torch.no_grad():
        model = build(kind, saved(tmp_path / "last.ckpt", content))
        close(model(batch()), logits(weights, batch(), rcps=rcps, fused=fused))


def test_untied_weights_need_a_mamba_for_each_direction(tmp_path: Path) -> None:
    weights = theirs("ps_fused", untied=True)
    path = saved(tmp_path / "w.pt", as_saved(weights, rcps=True))
    with pytest.raises(CheckpointError, match=r"untied weights .* build the model with mixer='s6'"):
        build("ps", path)
    with torch.no_grad():
        close(build("ps", path, mixer="s6")(batch()), logits(weights, batch(), rcps=True, fused=True))


def test_tied_weights_fit_a_mamba_for_each_direction_too(tmp_path: Path) -> None:
    weights = theirs("ph")
    path = saved(tmp_path / "w.pt", as_saved(weights, rcps=False))
    with torch.no_grad():
        close(build("ph", path, mixer="s6")(batch()), logits(weights, batch(), rcps=False, fused=False))


@pytest.mark.parametrize(("overrides", "count"), [({}, 7_725_312), ({"mixer": "s6"}, 14_016_768)])
def test_tied_and_untied_parameter_counts_are_the_originals(overrides: dict[str, Any], count: int) -> None:
    for name in ("caduceus_ph_d256_n16", "caduceus_ps_d256_n16"):
        for head in ("classifier", "mlm"):  # a tied head adds none
            model = mambaverse.create_model(name, num_classes=0, head=head, device="meta", **overrides)
            assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("embedding", ["embedding", "embeddings"])  # mamba_ssm, transformers
@pytest.mark.parametrize("mixer", ["s6", "ssd", "mamba3"])
def test_causal_mamba_loads_from_its_own_names(mixer: str, embedding: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"dim": 16, "depth": 2, "mixer": mixer, "head": "causal_lm"}
    torch.manual_seed(1)
    source: Any = mambaverse.create_model("dna_mamba_d64_n2", **arguments).eval()
    renamed = {
        f"backbone.{name.replace('embeddings.word_embeddings', embedding)}": value
        for name, value in source.state_dict().items()
    }
    path = saved(tmp_path / "pytorch_model.bin", renamed | {"lm_head.weight": renamed[f"backbone.{embedding}.weight"]})
    model = mambaverse.create_model("dna_mamba_d64_n2", **arguments, checkpoint_path=path).eval()
    assert torch.equal(model(batch()), source(batch()))


def test_a_head_of_its_own_is_held_only_where_asked(tmp_path: Path) -> None:
    weights = as_saved(theirs("ph"), rcps=False)
    head = torch.randn(16, DIM)
    path = saved(tmp_path / "w.pt", weights | {"lm_head.weight": head})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not the embedding; .*tie_embeddings=False"):
        build("ph", path)
    model = build("ph", path, tie_embeddings=False)
    assert torch.equal(model.lm_head.weight, head)
    tied = saved(tmp_path / "tied.pt", {name: v for name, v in weights.items() if name != "lm_head.weight"})
    model = build("ph", tied, tie_embeddings=False)
    assert torch.equal(model.lm_head.weight, model.embeddings.word_embeddings.weight)


def test_a_pretrained_body_takes_a_new_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = as_saved(theirs("ps_fused"), rcps=True) | {"score.weight": torch.randn(5, DIM)}
    path = saved(tmp_path / "w.pt", weights)
    model = build("ps", path, head="tokens", num_classes=3)
    assert model.score.weight.shape == (3, DIM)
    told = capsys.readouterr().err
    assert "rcps_swap_halves is set" in told and "its head has 5 outputs and is left out" in told
    build("ps", path, head="classifier", pool="attention", num_classes=5)
    assert "holds no attention_pool.weight; they start anew" in capsys.readouterr().err
    build("ps", path)
    assert "score.weight are of another head and left out" in capsys.readouterr().err


def test_what_is_saved_of_swapped_weights_is_never_taken_for_others(tmp_path: Path) -> None:
    first = build("ps", saved(tmp_path / "w.pt", as_saved(theirs("ps_fused"), rcps=True)))
    save_file(first.state_dict(), tmp_path / "ours.safetensors")
    again = build("ps", tmp_path / "ours.safetensors")
    assert torch.equal(again(batch()), first(batch()))
    plain: Any = mambaverse.create_model("caduceus_ps_d32_n2", dim=DIM, depth=DEPTH, head="mlm")
    with pytest.raises(RuntimeError, match="rcps_swap_halves"):
        plain.load_state_dict(first.state_dict())


def test_the_swap_may_be_overruled_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = theirs("ps")
    path = saved(tmp_path / "w.pt", as_saved(as_fused(weights), rcps=True))
    model = build("ps", path, rcps_swap_halves=False)
    assert "rcps_swap_halves is not set, but the file was made with it" in capsys.readouterr().err
    with torch.no_grad():
        close(model(batch()), logits(weights, batch(), rcps=True, fused=False))


def test_ph_read_on_both_strands_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build("ps", saved(tmp_path / "w.pt", as_saved(theirs("ph"), rcps=False)))
    assert "post-hoc conjoining" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "change", "overrides", "message"),
    [
        ("ps_fused", {}, {"both_strands": False}, "weights of Caduceus-PS; build caduceus_ps_*"),
        ("ps", {}, {"dim": 32}, "16 channels and 3 layers, the model has 32 and 3; build caduceus_ps_d16_n3"),
        ("ph", {}, {"depth": 2}, "16 channels and 3 layers, the model has 16 and 2; build caduceus_ph_d16_n3"),
        ("ph", {"layers.0.mixer.mamba_fwd.D": torch.zeros(3)}, {}, "layers.0.mixer.D (3,), expected (32,)"),
        ("ph", {"layers.1.mixer.mamba_rev.extra": torch.zeros(3)}, {}, "1 unexpected (layers.1.mixer.extra_b)"),
        ("ph", {"decoder.0.weight": torch.zeros(3)}, {}, "1 unexpected (decoder.0.weight)"),
        ("ph", {"embeddings.word_embeddings.weight": torch.zeros(12, 16)}, {}, "an alphabet of 12 ids, expected 16"),
        ("ps", {"embeddings.word_embeddings.complement_map": torch.arange(16)}, {}, "complement_map [0, 1, 2"),
        ("ph", {}, {"mixer_args": {"vim": {"merge": "mean"}}}, "directions merged by 'add', the model's by 'mean'"),
        ("ph", {}, {"head": "classifier", "stem": "kmer", "stem_kernel": 3}, "set stem='embedding' with stem_stride=1"),
        ("ph", {}, {"mixer": "bissd"}, "which BiSSD in layer 0 cannot hold; build the model with mixer='vim'"),
        ("ph", {}, {"mixer": "s6", "directions": 1}, "which S6 in layer 0 cannot hold"),
    ],
)
def test_weights_of_another_model_are_refused_by_name(
    kind: str, change: dict[str, Tensor], overrides: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = saved(tmp_path / "w.pt", theirs(kind) | change)
    with pytest.raises(CheckpointError) as caught:
        build(kind, path, **overrides)
    assert message in str(caught.value) and "w.pt" in str(caught.value)


def test_directions_that_are_multiplied_are_told_by_the_config_beside(tmp_path: Path) -> None:
    path = saved(tmp_path / "pytorch_model.bin", as_saved(theirs("ph"), rcps=False))
    (tmp_path / "config.json").write_text(json.dumps({"bidirectional_strategy": "ew_multiply"}))
    with pytest.raises(CheckpointError, match=r"set mixer='s6' and the mixer's argument merge='ew_multiply'"):
        build("ph", path)
    build("ph", path, mixer="s6", mixer_args={"bidirectional": {"merge": "ew_multiply"}})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not the JSON"):
        build("ph", path)


def test_a_run_starts_from_such_a_file_and_is_told_of_the_swap(make_task: Make, table: Path, tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pt", as_saved(theirs("ps_fused"), rcps=True))
    arguments = f"model.args={{dim: {DIM}, depth: {DEPTH}, stem: embedding, stem_stride: 1}}"
    mixer = ("model.mixer=vim", "model.mixer_args={vim: {d_state: 16, expand: 2}}")
    task = make_task("dna/fasta", f"data.root={table}", "model.name=caduceus_ps_d32_n2", *mixer, arguments)
    with pytest.raises(CheckpointError, match=r"in a config model\.args\.rcps_swap_halves=true"):
        task.load_checkpoint(task.build_model(), path)
    task.config.model.args["rcps_swap_halves"] = True
    member: Any = task.build_model()
    task.load_checkpoint(member, path)
    assert torch.equal(member.norm_f.weight, theirs("ps_fused")["norm_f.weight"])


def test_a_head_for_as_many_other_classes_starts_anew(
    make_task: Make, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = f"model.args={{dim: {DIM}, depth: {DEPTH}, wide: 1}}"
    task = make_task("dna/fasta", f"data.root={table}", "model.name=caduceus_ph_d32_n2", arguments)
    old: Any = task.build_model()
    with torch.no_grad():
        old.wide.bias += 1
    path = saved(tmp_path / "w.pt", old.state_dict())
    theirs = [f"other {name}" for name in task.classes]
    for classes, kept in (([*task.classes], True), (theirs, False), (theirs[1:], True)):  # others: no such run's file
        (tmp_path / "facts.json").write_text(json.dumps({"classes": classes}))
        new: Any = task.build_model()
        first = new.score.weight.clone()
        task.load_checkpoint(new, path)
        assert torch.equal(new.norm_f.weight, old.norm_f.weight)
        assert torch.equal(new.score.weight, old.score.weight if kept else first)
        assert torch.equal(new.wide.bias, old.wide.bias) == kept
        told = f"its head knows other classes (other {task.classes[0]}, " in capsys.readouterr().err
        assert told != kept


def test_files_that_are_not_there_or_run_code(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights file"):
        build("ph", tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match=r"a folder without model\.safetensors or pytorch_model\.bin"):
        build("ph", tmp_path)
    with pytest.raises(CheckpointError, match="refused, since reading it would run code"):
        build("ph", saved(tmp_path / "code.ckpt", {"state_dict": {}, "callbacks": Path("x")}))
