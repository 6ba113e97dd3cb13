"""Windows: where they lie, which are left out, what a sample of them is, and how they are split and masked."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from mambaverse.errors import UserError
from mambaverse.tasks.dna.genome import Genome, Region
from mambaverse.tasks.dna.pretraining.masking import mask_bases, next_bases
from mambaverse.tasks.dna.pretraining.splits import split_genome
from mambaverse.tasks.dna.pretraining.windows import Windows, known_windows
from mambaverse.tasks.dna.tasks.dna_lm import genome_samples
from mambaverse.tasks.dna.tokens import MASK, PAD, A, C, N, T, encode
from tests.tasks.dna.pretraining.conftest import Config, Open, markov, write_fasta


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_tiles_cover_each_interval_and_end_with_it() -> None:
    windows = Windows([Region("a", 10, 260), Region("b", 0, 70), Region("a", 300, 400)], 100)
    tiles = [windows.tile(i) for i in range(len(windows))]
    assert [(t.name, t.start, t.end) for t in tiles] == [
        ("a", 10, 110), ("a", 110, 210), ("a", 160, 260), ("b", 0, 70), ("a", 300, 400),
    ]  # fmt: skip


@pytest.mark.parametrize("pieces", [1, 4])
def test_shifted_windows_stay_inside_and_reach_both_ends(pieces: int) -> None:
    region = Region("a", 1000, 1530)
    windows = Windows([Region("b", 0, 100), region], 100)
    starts = []
    for number in range(1, len(windows)):
        for u in (*np.random.default_rng(0).random(200).tolist(), 0.0, 1 - 1e-9):
            for piece in range(pieces):
                found = windows.drawn(number, u, piece, pieces)
                assert found.name == "a" and region.start <= found.start and found.end <= region.end
                assert len(found) == 100 // pieces
                starts.append(found.start)
    assert (min(starts), max(starts)) == (1000, 1530 - 100 // pieces)
    counts = np.histogram(starts, 10)[0]
    assert counts.min() > 0.6 * counts.mean()  # no start is favoured
    assert len(windows.drawn(0, 0.9)) == 100 and len(Windows([Region("b", 0, 30)], 100).drawn(0, 0.9)) == 30


def test_windows_of_n_are_left_out(tmp_path: Path) -> None:
    text = "A" * 250 + "N" * 100 + "R" * 30 + "c" * 70 + "N" * 45
    genome = Genome(write_fasta(tmp_path / "g.fa", {"a": text, "b": "N" * 40}))
    windows = Windows([Region("a", 0, len(text)), Region("b", 0, 40)], 50)
    kept = known_windows(genome, windows, 0.5)
    shares = [
        np.mean([letter not in "ACGTacgt" for letter in genome.fetch(windows.tile(i)).decode()])
        for i in range(len(windows))
    ]
    assert kept.tolist() == [i for i, share in enumerate(shares) if share <= 0.5] and 0 < len(kept) < len(windows)


def test_a_sample_is_a_function_of_its_draws_also_in_a_worker(opened: Open) -> None:
    task = opened("data.length_warmup=32", "task.soft_mask_weight=0.5")
    samples = genome_samples(task.train_set)
    copied = pickle.loads(pickle.dumps(samples))
    for epoch in (0, 1, 2, 5):
        rows = [part.of_epoch(epoch).sample(3, draw(5)) for part in (samples, samples, copied)]
        for key in ("ids", "target", "weight"):
            assert all(np.array_equal(a, b) for row in rows[1:] for a, b in zip(rows[0][key], row[key], strict=True))
    fixed = [samples.sample(3, None)["ids"][0] for _ in range(2)]
    assert np.array_equal(*fixed) and not np.array_equal(fixed[0], samples.sample(3, draw(5))["ids"][0])


def test_length_warm_up_keeps_the_tokens_of_a_batch(opened: Open) -> None:
    task = opened("data.length_warmup=32", "data.length_warmup_epochs=2", "data.valid_chromosomes=[chr2]")
    samples = genome_samples(task.train_set)
    shapes = []
    for epoch in range(6):
        view = samples.of_epoch(epoch)
        rows = [view.sample(i, draw(i)) for i in range(8)]
        assert len(view) == len(samples)
        shapes.append(tuple(task.collate(rows, draw(0))["ids"].shape))
    assert shapes == [(32, 32)] * 2 + [(16, 64)] * 2 + [(8, 128)] * 2
    options = ("data.length_warmup=32", "data.length_warmup_epochs=2")
    heads = [opened(*options, f"trainer.epochs={epochs}").describe()["length warm-up"] for epochs in (4, 5)]
    assert heads[0].endswith("every 2 epochs; 64 in the last epoch, never 128") and heads[1].endswith("every 2 epochs")
    # Without shifts, the pieces of an epoch are those of all tiles, each once.
    still = genome_samples(opened("data.length_warmup=32", "data.random_windows=false", "data.reverse_complement=0",
                                  "task.mask_rate=0.0001", "data.valid_chromosomes=[chr2]").train_set)  # fmt: skip
    pieces = [ids.tobytes() for i in range(len(still)) for ids in still.of_epoch(0).sample(i, draw(i))["ids"]]
    tiles = [still.genome.ids(still.windows.part(int(n), j, 4)).tobytes() for n in still.kept for j in range(4)]
    assert len(pieces) == len(tiles) and len(set(pieces) & set(tiles)) > 0.95 * len(set(tiles))


def test_windows_of_an_epoch_are_a_chosen_number(opened: Open) -> None:
    samples = genome_samples(opened("data.epoch_windows=40", "data.eval_windows=3").train_set)
    assert len(samples) == 40 and len(samples.kept) > 100
    first = [samples.sample(0, draw(seed))["ids"][0].tobytes() for seed in range(20)]
    assert len(set(first)) == 20
    assert len(opened("data.eval_windows=3").eval_set) == 3
    more = genome_samples(opened("data.epoch_windows=5000").train_set)
    assert len(more) == 5000 and len(more.sample(10, draw(0))["ids"][0]) == 128


def test_the_other_strand_is_read_half_of_the_time(opened: Open) -> None:
    task = opened("data.random_windows=false", "task.mask_rate=0.0001")
    task.build_model()
    samples = genome_samples(task.train_set)
    forward = samples.genome.ids(samples.windows.tile(int(samples.kept[9])))
    same = [float((samples.sample(9, draw(seed))["ids"][0] == forward).mean()) > 0.9 for seed in range(200)]
    assert 60 < sum(same) < 140


# Splits


def test_a_bed_says_what_is_held_out_and_short_intervals_are_widened(genome: Path, config: Config) -> None:
    bed = genome.with_name("s.bed")
    bed.write_text(
        "chr1\t0\t9000\ttrain\n1\t30000\t39990\tvalid\nchr1\t39990\t40000\tvalidation\nchr2\t10\t900\ttest\n"
    )
    split = split_genome(Genome(genome), config().data, bed)  # type: ignore[arg-type]
    assert split.regions["eval"] == [Region("chr1", 30_000, 39_990), Region("chr1", 39_872, 40_000)]
    assert split.rows["eval"][1] == Region("chr1", 39_990, 40_000)
    assert split.shared() == {"eval": 0, "test": 0}
    bed.write_text("chr1\t0\t9000\ttrain\nchr1\t9000\t9010\ttest\n")
    split = split_genome(Genome(genome), config().data, bed)  # type: ignore[arg-type]
    assert set(split.regions) == {"train", "eval"} and split.shared() == {"eval": 1}


def test_stretches_and_chromosomes_are_held_out_and_written_down(opened: Open, tmp_path: Path) -> None:
    task = opened()
    samples = [genome_samples(part) for part in (task.train_set, task.eval_set, task.test_set) if part is not None]
    covered = np.zeros(49_050, int)
    offset = {"chr1": 0, "chr2": 40_000, "tiny": 49_000}
    for part in samples:
        for region in part.windows.regions:
            covered[offset[region.name] + region.start : offset[region.name] + region.end] += 1
    assert (covered == 1).all()  # each base is in one set
    written = task.save_split(tmp_path)
    assert written is not None
    again = opened(f"data.bed={written}")
    for a, b in zip(samples, (again.train_set, again.eval_set, again.test_set), strict=True):
        assert list(a.windows.regions) == list(genome_samples(b).windows.regions)  # type: ignore[arg-type]
    by_name = opened("data.valid_chromosomes=[2]", "data.test_chromosomes=[tiny]")
    assert {r.name for r in genome_samples(by_name.eval_set).windows.regions} == {"chr2"}
    assert len(genome_samples(by_name.test_set).sample(0, None)["ids"][0]) == 50  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("chr1\t0\t100", "line 2: 3 columns; expected 4"),
        ("chr1\t0\t100\ttrian", r"line 2: split 'trian' in column 4, did you mean 'train'\?"),
        ("chr1\t0\t50000\tvalid", "line 2: end 50,000 is past the end of chr1"),
        ("chr9\t0\t100\tvalid", "line 2: .*no record 'chr9'"),
        ("chr1\t200\t100\tvalid", "line 2: start 200 behind end 100"),
        ("chr1\t100\t100\tvalid", "line 2: an empty interval"),
        ("chr1\t100\t900\ttrain", "column 4 has only train; expected train and valid"),
    ],
)
def test_a_bad_line_of_a_bed_is_named(opened: Open, genome: Path, line: str, said: str) -> None:
    bed = genome.with_name("bad.bed")
    bed.write_text(f"chr1\t0\t9000\ttrain\n{line}\n")
    with pytest.raises(UserError, match=said):
        opened(f"data.bed={bed}")


# Masking


def test_masks_are_as_many_and_of_the_kinds_that_they_should_be() -> None:
    ids = encode(markov(200_000))
    ids[1000:3000] = N
    seen, target = mask_bases(ids, 0.15, draw(1))
    asked = target != PAD
    assert (target[asked] == ids[asked]).all() and not asked[1000:3000].any() and (seen[1000:3000] == N).all()
    assert abs(asked.sum() / 198_000 - 0.15) < 0.003
    masked = (seen == MASK) & asked
    kept = (seen == ids) & asked
    assert abs(masked.sum() / asked.sum() - 0.8) < 0.01
    assert abs(kept.sum() / asked.sum() - 0.125) < 0.01  # a quarter of the random ones are what they were
    assert set(seen[asked & ~masked].tolist()) == {A, C, C + 1, T} and (seen[~asked] == ids[~asked]).all()


def test_the_masks_of_caduceus_draw_from_all_ids_and_hide_n() -> None:
    ids = encode(markov(50_000))
    ids[:5000] = N
    seen, target = mask_bases(ids, 0.15, draw(1), compat=True)
    asked = target != PAD
    assert not asked[:5000].any() and set(seen[5000:][asked[5000:]].tolist()) == set(range(12))
    assert abs((seen[:5000] == PAD).mean() - 0.86) < 0.02  # the rest is masked or random
    assert N not in seen[:5000] or (seen[:5000] == N).mean() < 0.01


def test_the_next_base_is_asked_where_there_is_one() -> None:
    ids = torch.tensor([[A, N, C, T, PAD], [T, T, A, C, A]], dtype=torch.uint8)
    assert next_bases(ids).tolist() == [[PAD, C, T, PAD, PAD], [T, A, C, A, PAD]]
