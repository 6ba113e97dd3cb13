"""The command line: mambaverse train | eval | predict | explain | score | mutagenesis | embed | scan | list | ...

Each command imports only what it runs. What the user gave wrong is one line on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import io
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mambaverse._version import __version__
from mambaverse.errors import NO_TEXT, UserError, leave_stdout, of_module


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return the exit status."""
    parser = _parser()
    arguments, behind = parser.parse_known_args(argv)
    if behind:  # argparse takes no positional argument behind an option if it took those before it
        if any(word.startswith("-") or "=" not in word for word in behind) or "overrides" not in arguments:
            parser.error(f"unrecognized arguments: {' '.join(behind)}")
        arguments.overrides += behind
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")  # Pillow's, of what is read all the same
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=NO_TEXT)
    try:
        status = arguments.run(arguments) or 0
        sys.stdout.flush()  # what cannot be written is told here, not when the interpreter ends
        return status
    except KeyboardInterrupt:
        return _status(2)
    except BrokenPipeError:  # `mambaverse list models | head`
        leave_stdout()
        return 0
    except OSError as error:  # a full disk behind stdout, a file without rights
        print(f"error: {error}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:
            leave_stdout()
        return 2
    except Exception as raised:
        told = of_module(raised)
        backend = sys.modules.get("mambaverse.kernels.backend")  # not imported here: it loads torch
        if not isinstance(told, (UserError, *([backend.BackendError] if backend else []))):
            raise
        print(f"error: {told}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mambaverse", description="State-space models for images, DNA and audio.")
    parser.add_argument("--version", action="version", version=f"mambaverse {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int | None], summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(run=run)
        return sub

    def config_dir(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--config-dir", type=Path, help="a folder of your own configs, searched first")

    def on_error(sub: argparse.ArgumentParser) -> None:
        text = "what to do with a bad file; default: the run's data.on_error"
        sub.add_argument("--on-error", choices=("raise", "skip"), help=text)

    train = command("train", _train, "Train from a config: mambaverse train vision/digits model.mixer=ssd")
    train.add_argument("config", nargs="?", help="a config's name, such as vision/digits, or a .yaml file")
    train.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="changes to the config")
    train.add_argument("--resume", type=Path, metavar="RUN", help="go on with the run in this folder")
    config_dir(train)

    evaluate = command("eval", _eval, "Evaluate a run's weights on its evaluation data, or its test data if it has any")
    evaluate.add_argument("folder", type=Path, metavar="RUN", help="a run folder")
    evaluate.add_argument("--baseline", action="store_true", help="fit the simple baselines too, on the same data")
    evaluate.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="changes to the config")

    predict = command("predict", _predict, "Label files with a trained run")
    predict.add_argument("folder", type=Path, metavar="RUN", help="a run folder")
    predict.add_argument("inputs", nargs="+", metavar="FILE", help="files, or folders of files")
    text = "csv: input, label, probability, each class; json: name, label, probability, probabilities; default: table"
    predict.add_argument("--format", choices=("table", "csv", "json"), default="table", help=text)
    predict.add_argument(
        "--sheet", type=Path, metavar="FILE", help="draw them with their labels, as .png, .pdf, .svg or .jpg"
    )
    on_error(predict)

    explain = command("explain", _explain, "Draw what a trained run looks at, a picture for each file")
    explain.add_argument("folder", type=Path, metavar="RUN", help="a run folder")
    explain.add_argument("inputs", nargs="+", metavar="FILE", help="files, or folders of files")
    explain.add_argument("--out", type=Path, metavar="FOLDER", help="where to; default: RUN/explain")
    on_error(explain)

    baseline = command(
        "baseline", _baseline, "Fit simple models to a config's data: the floor that a network has to beat"
    )
    baseline.add_argument("config", help="a config's name, such as dna/rrna16s, or a .yaml file")
    baseline.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="changes to the config")
    config_dir(baseline)

    audit = command(
        "audit", _audit, "Look for copies and near neighbours of training samples in a config's evaluation sets"
    )
    audit.add_argument("config", help="a config's name, such as dna/gue, or a .yaml file")
    audit.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="changes to the config")
    audit.add_argument(
        "--similarity", type=float, metavar="S", help="from which on samples are near neighbours, 0 to 1; DNA: 0.5"
    )
    audit.add_argument("--output", type=Path, metavar="FILE", help="write the pairs to this .csv file")
    config_dir(audit)

    compare = command(
        "compare",
        _compare,
        "Say whether runs are better than others, or than the simple baselines, by paired bootstrap",
    )
    compare.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs: seeds of one config"
    )
    compare.add_argument("--to", nargs="+", type=Path, default=[], metavar="RUN", help="what to compare them with")
    compare.add_argument("--score", help="accuracy, f1, macro_f1 or mcc; default: what the run was chosen by")
    compare.add_argument("--resamples", type=int, default=2000, metavar="N", help="draws of the samples; default: 2000")

    listing = command("list", _list, "List what there is: mambaverse list models 'vim*'")
    listing.add_argument("kind", choices=("mixers", "models", "datasets", "configs"))
    listing.add_argument("pattern", nargs="?", default="*", help="such as 'vim_*'")
    listing.add_argument("-v", "--verbose", action="store_true", help="mixers, models: import each and say what it is")
    config_dir(listing)

    config = command("config", _config, "Print a resolved config")
    config.add_argument("config", help="a config's name, such as vision/digits, or a .yaml file")
    config.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="changes to the config")
    config_dir(config)

    data = command("data", _data, "Find a data set, build it from the package that ships it, or say how to get it")
    data.add_argument("name", help="such as vision/cifar10; or a genome to index, such as hg38.fa")
    data.add_argument("--root", help="where its files are: a folder, a file, or a .deb or .whl package")

    _dna_commands(command)

    bench = command(
        "bench", _bench, "Time an operator's backends, mixers, or the scan beside attention: correctness first"
    )
    bench.add_argument("what", help="an operator such as selective_scan, or mixer, or scan_vs_attention")
    bench.add_argument("names", nargs="*", default=[], metavar="NAME", help="bench mixer: which ones; default: all")
    bench.add_argument("--case", metavar="PATTERN", help="operators: only the cases that match")
    bench.add_argument("--sizes", metavar="BxLxD,...", help="mixer: batch, length and width, such as 8x2048x1024")
    bench.add_argument("--lengths", metavar="L,...", help="scan_vs_attention: such as 512,1024,64k")
    bench.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    bench.add_argument("--dtype", help="fp32, bf16 or fp16; default: bf16 on a GPU, else fp32")
    bench.add_argument("--repeat", default="10", metavar="N", help="timed runs of each; default: 10")
    bench.add_argument("--csv", type=Path, metavar="FILE", help="write the table to this file too")
    bench.add_argument("--plot", type=Path, metavar="FILE", help="draw the times, as .png, .pdf or .svg")
    return parser


def _dna_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add what is done with a run of a DNA model and a genome."""

    def of_run(name: str, run: Callable[[argparse.Namespace], int | None], summary: str) -> argparse.ArgumentParser:
        sub = command(name, run, summary)
        sub.add_argument("folder", type=Path, metavar="RUN", help="the run folder of a DNA model")
        sub.add_argument("--strands", choices=("one", "both"), help="average both strands; default: as the run does")
        sub.add_argument("--batch-size", type=int, metavar="N", help="windows of one pass; default: by their length")
        sub.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: as the run says")
        sub.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="default: as the run says")
        return sub

    def fasta(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--fasta", type=Path, required=True, metavar="FILE", help="the genome, plain or BGZF")

    def on_error(sub: argparse.ArgumentParser) -> None:
        text = "what to do with a bad record; default: the run's data.on_error"
        sub.add_argument("--on-error", choices=("raise", "skip"), help=text)

    def overwrite(sub: argparse.ArgumentParser, *, resumable: bool = False) -> None:
        also = ", and begin anew what was cut off" if resumable else ""
        sub.add_argument("--overwrite", action="store_true", help=f"replace what is finished{also}")

    score = of_run("score", _score, "Score the variants of a VCF file with a trained DNA model, into a table")
    score.add_argument("--vcf", type=Path, required=True, metavar="FILE", help="the variants: .vcf, .vcf.gz")
    fasta(score)
    score.add_argument("--out", type=Path, default=Path("scores.tsv"), metavar="FILE", help="default: scores.tsv")
    score.add_argument("--window", type=int, default=1024, metavar="W", help="bases around a variant; default: 1024")
    score.add_argument("--scores", nargs="+", metavar="NAME", help="llr, delta, embedding; default: all it has")
    on_error(score)
    overwrite(score, resumable=True)

    text = "Say and draw what each substitution in a region changes: a table, arrays, a logo and a heat map"
    mutagenesis = of_run("mutagenesis", _mutagenesis, text)
    fasta(mutagenesis)
    mutagenesis.add_argument("--region", required=True, metavar="CHR:A-B", help="such as chr1:1,000-1,200")
    mutagenesis.add_argument("--out", type=Path, metavar="NAME", help="of the files, also with one of their endings")
    mutagenesis.add_argument("--window", type=int, metavar="W", help="bases that the model sees; default: 1024")
    mutagenesis.add_argument("--class", dest="label", metavar="NAME", help="whose score; default: the predicted one")
    overwrite(mutagenesis)

    embed = of_run("embed", _embed, "Write the embeddings of sequences by a trained DNA model")
    embed.add_argument("inputs", nargs="+", metavar="FILE", help="FASTA files or tables, or folders of them")
    embed.add_argument("--out", type=Path, required=True, metavar="FILE", help=".npz, or .parquet (needs pyarrow)")
    embed.add_argument("--pool", default="mean", metavar="NAME", help="mean, last, cls or base; default: mean")
    embed.add_argument("--layer", type=int, metavar="N", help="blocks passed; default: all, and the last norm")
    embed.add_argument("--window", type=int, metavar="W", help="bases read at a time; default: the run's data.window")
    on_error(embed)
    overwrite(embed)

    scan = of_run("scan", _scan, "Write what a trained DNA model says along a genome, as a bedGraph track")
    fasta(scan)
    scan.add_argument("--out", type=Path, required=True, metavar="FILE", help="the track, .bedgraph")
    scan.add_argument("--regions", nargs="+", default=[], metavar="CHR:A-B", help="where; default: everywhere")
    scan.add_argument("--bed", type=Path, metavar="FILE", help="where, as a BED file")
    scan.add_argument("--window", type=int, metavar="W", help="bases seen; default: the run's data.window, or 1024")
    scan.add_argument("--stride", type=int, default=128, metavar="S", help="bases of a value; default: 128")
    scan.add_argument("--value", metavar="NAME", help="probability, quantity, log_likelihood or perplexity")
    scan.add_argument("--class", dest="label", metavar="NAME", help="whose probability; default: the last of two")
    overwrite(scan, resumable=True)


def _roots(arguments: argparse.Namespace) -> list[Path]:
    from mambaverse.config import CONFIGS

    own = arguments.config_dir
    if own is not None and not own.is_dir():
        raise UserError(f"--config-dir: no folder {str(own)!r}")
    return [CONFIGS] if own is None else [own, CONFIGS]


def _train(arguments: argparse.Namespace) -> int:
    from mambaverse.config import compose
    from mambaverse.engine import run

    if arguments.resume is not None:
        if arguments.config is not None:
            raise UserError("--resume RUN takes its config from the run folder; give one or the other")
        return _status(run.resume(arguments.resume).signal)
    if arguments.config is None:
        raise UserError("train: give a config, such as vision/digits, or --resume RUN; see `mambaverse list configs`")
    config = compose(arguments.config, arguments.overrides, roots=_roots(arguments))
    return _status(run.train(config, name=arguments.config).signal)


def _status(signal: int | None) -> int:
    """Return what a shell says of a process that ended by `signal`."""
    return 0 if signal is None else 128 + signal


def _eval(arguments: argparse.Namespace) -> None:
    from mambaverse.engine import evaluate

    evaluate.evaluate_run(arguments.folder, arguments.overrides, baseline=arguments.baseline)


def _baseline(arguments: argparse.Namespace) -> None:
    from mambaverse.config import compose
    from mambaverse.engine.baseline import baseline_config

    baseline_config(compose(arguments.config, arguments.overrides, roots=_roots(arguments)))


def _audit(arguments: argparse.Namespace) -> None:
    from mambaverse.config import compose
    from mambaverse.engine.audit import audit_config

    config = compose(arguments.config, arguments.overrides, roots=_roots(arguments))
    audit_config(config, similarity=arguments.similarity, output=arguments.output)


def _compare(arguments: argparse.Namespace) -> None:
    from mambaverse.engine.compare import MOST_RESAMPLES, compare_runs

    if not 2 <= arguments.resamples <= MOST_RESAMPLES:
        raise UserError(f"--resamples: expected 2 or more, at most {MOST_RESAMPLES:,}, got {arguments.resamples:,}")
    compare_runs(arguments.runs, arguments.to, score=arguments.score, resamples=arguments.resamples)


def _predict(arguments: argparse.Namespace) -> None:
    from mambaverse.engine import evaluate

    how = {"form": arguments.format, "on_error": arguments.on_error, "sheet": arguments.sheet}
    evaluate.predict_run(arguments.folder, arguments.inputs, **how)


def _explain(arguments: argparse.Namespace) -> None:
    from mambaverse.engine.explain import explain_run

    explain_run(arguments.folder, arguments.inputs, out=arguments.out, on_error=arguments.on_error)


def _score(arguments: argparse.Namespace) -> None:
    from mambaverse.tasks.dna.variants.command import score_run

    keys = ("window", "scores", "on_error", "overwrite")
    score_run(arguments.folder, arguments.vcf, arguments.fasta, out=arguments.out, **_reading(arguments, *keys))


def _mutagenesis(arguments: argparse.Namespace) -> None:
    from mambaverse.tasks.dna.interpret.command import mutagenesis_run

    keys = ("out", "window", "label", "overwrite")
    mutagenesis_run(arguments.folder, arguments.fasta, arguments.region, **_reading(arguments, *keys))


def _embed(arguments: argparse.Namespace) -> None:
    from mambaverse.tasks.dna.interpret.embed import embed_run

    keys = ("out", "pool", "layer", "window", "on_error", "overwrite")
    embed_run(arguments.folder, arguments.inputs, **_reading(arguments, *keys))


def _scan(arguments: argparse.Namespace) -> None:
    from mambaverse.tasks.dna.interpret.scan import scan_run

    keys = ("out", "regions", "bed", "window", "stride", "value", "label", "overwrite")
    scan_run(arguments.folder, arguments.fasta, **_reading(arguments, *keys))


def _reading(arguments: argparse.Namespace, *keys: str) -> dict[str, Any]:
    """Return the options that all commands on a run of a DNA model have, and those of `keys`."""
    return {key: getattr(arguments, key) for key in ("strands", "batch_size", "device", "precision", *keys)}


def _list(arguments: argparse.Namespace) -> None:
    if arguments.config_dir is not None and arguments.kind != "configs":
        raise UserError(f"list {arguments.kind} takes no --config-dir: that is for `list configs`")
    if arguments.verbose and arguments.kind in (alone := {"datasets": "data", "configs": "config"}):
        command = f"mambaverse {alone[arguments.kind]} NAME"
        raise UserError(f"list {arguments.kind} takes no -v: `{command}` says what one of them is")
    names, describe = _catalogue(arguments)
    if not names:
        raise UserError(f"no {arguments.kind} match {arguments.pattern!r}")
    if not arguments.verbose or describe is None:
        print("\n".join(names))
        return
    from mambaverse.engine.catalogue import print_described

    print_described([describe(name) for name in names], counted=arguments.kind == "models")


def _catalogue(arguments: argparse.Namespace) -> tuple[list[str], Callable[[str], dict[str, str]] | None]:
    pattern = arguments.pattern
    if arguments.kind == "mixers":
        from mambaverse.mixers import describe_mixer, list_mixers

        return list_mixers(pattern), describe_mixer
    if arguments.kind == "models":
        from mambaverse.models import describe_model, list_models

        return list_models(pattern), describe_model
    if arguments.kind == "datasets":
        from mambaverse.datasets import list_datasets

        return list_datasets(pattern), None
    from fnmatch import fnmatchcase

    from mambaverse.config import list_configs

    return [name for name in list_configs(_roots(arguments)) if fnmatchcase(name, pattern)], None


def _config(arguments: argparse.Namespace) -> None:
    from mambaverse.config import compose, to_yaml

    print(to_yaml(compose(arguments.config, arguments.overrides, roots=_roots(arguments))), end="")


def _data(arguments: argparse.Namespace) -> None:
    from mambaverse.datasets import DATASETS, check_root, describe_dataset, get_dataset

    if Path(arguments.name).is_file():
        if arguments.root is not None:
            raise UserError(f"data {arguments.name} takes no --root: a genome is indexed where it is")
        from mambaverse.tasks.dna.genome import open_genome

        with open_genome(arguments.name) as genome:
            print(f"{genome.path}: {len(genome):,} records, {sum(genome.lengths.values()):,} bases")
        return
    if Path(arguments.name).suffix and ":" not in arguments.name and arguments.name not in DATASETS:
        raise UserError(f"data {arguments.name}: no such file; expected a genome's, or a data set's name")
    if arguments.root is not None:
        check_root(arguments.name, arguments.root)
    get_dataset(arguments.name).prepare(arguments.root)
    for key, value in describe_dataset(arguments.name, arguments.root).items():
        print(f"{key}: {value}")


def _bench(arguments: argparse.Namespace) -> None:
    from mambaverse.bench import bench

    given = {k: getattr(arguments, k) for k in ("case", "device", "dtype", "repeat", "sizes", "lengths")}
    bench(arguments.what, arguments.names, **given, csv_path=arguments.csv, plot_path=arguments.plot)


if __name__ == "__main__":
    sys.exit(main())
