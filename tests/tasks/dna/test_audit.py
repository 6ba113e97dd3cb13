"""What the leakage audit finds of planted copies, and what it leaves alone."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from mambaverse.cli import main
from mambaverse.config import ConfigError
from mambaverse.engine.audit import Audit
from mambaverse.tasks.dna.audit import audit_sets
from mambaverse.tasks.dna.places import overlaps
from mambaverse.tasks.dna.sequences import Place, Sequences
from mambaverse.tasks.dna.sketch import neighbours
from mambaverse.tasks.dna.tokens import A, N, T, encode, reverse_complement_ids
from tests.tasks.dna.conftest import Make, letters, read_csv, rows, write_csv

CLASSES = ("no", "yes")


def random_ids(count: int, length: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(A, T + 1, (count, length), dtype=np.uint8))


def changed(ids: np.ndarray, share: float, seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    other = (ids - A + draw.integers(1, 4, len(ids), dtype=np.uint8)) % 4 + A
    return np.where(draw.random(len(ids)) < share, other, ids).astype(np.uint8)


def sequences(ids: list[np.ndarray], labels: list[int] | None = None, places: list[Place] | None = None) -> Sequences:
    given = np.zeros(len(ids), int) if labels is None else np.array(labels, int)
    return Sequences(ids, given, [f"s{i}" for i in range(len(ids))], places=places)


def count(audit: Audit, name: str, finding: str) -> int:
    (leak,) = (leak for leak in audit.leaks if leak.set == name and leak.finding == finding)
    return leak.items


def test_copies_are_found_on_either_strand() -> None:
    train = random_ids(50, 80)
    test = [train[3], reverse_complement_ids(train[7]), *random_ids(10, 80, seed=1)]
    audit = audit_sets(sequences(train, [0] * 50), {"test": sequences(test, [0, 1, *[0] * 10])}, CLASSES)
    assert count(audit, "test", "exact copies") == 2
    assert count(audit, "test", "copies of another label") == 1
    assert count(audit, "test", "near neighbours (50%)") == 0  # a copy is not counted twice
    assert [(p.name, p.other, p.label, p.other_label) for p in audit.pairs] == [
        ("s0", "s3", "no", "no"), ("s1", "s7", "yes", "no"),
    ]  # fmt: skip
    assert audit.line() == "train: none; test: 2 exact copies (16.7%), 1 copies of another label (8.3%)"


def test_training_rows_that_contradict_each_other_are_found() -> None:
    a, b, c = random_ids(3, 60)
    train = sequences([a, b, reverse_complement_ids(a), b, c], [0, 1, 1, 1, 0])
    audit = audit_sets(train, {}, CLASSES)
    assert count(audit, "train", "repeated sequences") == 2 and count(audit, "train", "contradicting labels") == 2
    assert [(p.name, p.other) for p in audit.pairs] == [("s2", "s0")]


@pytest.mark.parametrize("length", [100, 300])
def test_near_copies_are_found_on_either_strand_and_strangers_are_not(length: int) -> None:
    train, strangers = random_ids(600, length), random_ids(600, length, seed=9)
    near = [changed(ids, 0.02, i) for i, ids in enumerate(train[:300])]
    near = [reverse_complement_ids(ids) if i % 2 else ids for i, ids in enumerate(near)]
    found = neighbours(sequences(train), sequences(near + strangers), 0.5)
    right = sum(i in found.rows[i] for i in range(300))
    assert right >= (300 * 0.93 if length == 100 else 300 * 0.99)  # of 100 bases four may be changed, and half is gone
    assert (found.count[300:] == 0).all() and not found.cut.any()


def test_long_sequences_are_compared_by_longer_k_mers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mambaverse.tasks.dna.sketch.LONG", 100)
    train = random_ids(50, 400)
    queries = [reverse_complement_ids(changed(ids, 0.01, i)) for i, ids in enumerate(train)]
    found = neighbours(sequences(train), sequences([*queries, *random_ids(20, 400, seed=7)]), 0.5)
    assert found.rows[:50, 0].tolist() == list(range(50)) and (found.count[50:] == 0).all()
    assert 0.75 < found.containment[:50, 0].mean() < 0.9  # 0.99^16 = 0.85


def test_pieces_and_shifted_windows_are_near_neighbours() -> None:
    (long,) = random_ids(1, 400)
    queries = [long[100:200], np.concatenate([long[100:], *random_ids(1, 100, seed=4)]), random_ids(1, 90, seed=5)[0]]
    found = neighbours(sequences([*random_ids(5, 400, seed=3), long]), sequences(queries), 0.5)
    assert found.rows[:2, 0].tolist() == [5, 5] and found.count.tolist() == [1, 1, 0]
    assert found.containment[0, 0] == 1.0 and 0.7 < found.containment[1, 0] < 0.8


def test_containment_is_that_of_the_sets_of_k_mers() -> None:
    def k_mers(ids: np.ndarray) -> set[bytes]:
        both = (ids, reverse_complement_ids(ids))
        windows = [[strand[i : i + 12].tobytes() for i in range(len(strand) - 11)] for strand in both]
        whole = [(one, two) for one, two in zip(windows[0], windows[1][::-1], strict=True) if N not in one]
        return {min(pair) for pair in whole}

    (base,) = random_ids(1, 200)
    other = changed(base, 0.03, 1)
    other[50] = N
    mine, theirs = k_mers(base), k_mers(other)
    found = neighbours(sequences([other]), sequences([base]), 0.01)
    assert found.containment[0, 0] == len(mine & theirs) / min(len(mine), len(theirs))


def test_repeats_that_many_have_are_not_searched_without_end() -> None:
    (repeat,) = random_ids(1, 60)
    train = [np.concatenate([repeat, own]) for own in random_ids(30_000, 20, seed=1)]
    found = neighbours(sequences(train), sequences([train[17], repeat]), 0.5)
    assert found.cut.all() and 17 in found.rows[0]  # its own seeds are rare, and come first


def test_sequences_without_enough_k_mers_are_counted_and_not_compared() -> None:
    simple = [encode("A" * 100), encode("ACGT" * 5), encode("N" * 50), encode("")]
    audit = audit_sets(sequences(simple), {"test": sequences([encode("A" * 90), *simple[1:3]])}, CLASSES)
    assert "3 of test not searched for neighbours: fewer than 20 distinct k-mers" in audit.line()
    assert count(audit, "test", "exact copies") == 2


@pytest.mark.parametrize(("trained", "tested"), [(0, 0), (4, 0), (0, 4), (1, 1)])
def test_empty_and_tiny_sets_are_audited(trained: int, tested: int) -> None:
    sets = [sequences(random_ids(n, 50, seed)) for seed, n in enumerate((trained, tested))]
    audit = audit_sets(sets[0], {"eval": sets[1]}, CLASSES)
    assert all(leak.items == 0 and leak.share == 0 for leak in audit.leaks) and audit.pairs == []


def test_overlaps_are_those_of_comparing_all_pairs() -> None:
    draw = np.random.default_rng(0)

    def draws(count: int) -> list[Place]:
        starts, sizes = draw.integers(0, 3_000, count), draw.integers(1, 80, count)
        return [
            (f"chr{c}", int(s), int(s + n)) for c, s, n in zip(draw.integers(0, 3, count), starts, sizes, strict=True)
        ]

    known, queries = [*draws(100), ("chr0", 0, 2_500)], draws(200)
    found = overlaps(known, queries)
    for i, (name, start, end) in enumerate(queries):
        best = max((min(end, e) - max(start, s) for c, s, e in known if c == name), default=0)
        assert found.shares[i] == max(best, 0) / (end - start)
        assert (found.rows[i] >= 0) == (best > 0)
    assert overlaps([], queries).rows.max() == -1 and len(overlaps(known, []).rows) == 0


def test_places_that_touch_do_not_overlap_and_strands_are_ignored() -> None:
    ids = random_ids(4, 40)
    train = sequences(ids[:1], places=[("1", 100, 140)])
    test = sequences(ids[1:], places=[("1", 140, 180), ("1", 125, 165), ("1", 115, 155)])
    audit = audit_sets(train, {"test": test}, CLASSES)
    assert count(audit, "test", "overlaps") == 2 and count(audit, "test", "overlaps of half or more") == 1
    assert [(p.name, p.similarity) for p in audit.pairs] == [("s1", 0.375), ("s2", 0.625)]


def test_a_similarity_out_of_range_is_refused() -> None:
    for value in (0.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="--similarity: expected a number above 0, at most 1"):
            audit_sets(sequences([]), {}, CLASSES, value)


def leaky(folder: Path) -> Path:
    """Write a data set of 24 training and 8 test sequences, one of which is a copy."""
    data = [(letters(60, i), label) for i, label in zip(range(32), itertools.cycle(CLASSES), strict=False)]
    write_csv(folder / "train.csv", data[:24])
    write_csv(folder / "test.csv", [data[0], *data[25:]])
    return folder


def test_the_command_prints_a_table_and_writes_the_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, output = leaky(tmp_path / "data"), tmp_path / "pairs.csv"
    assert main(["audit", "dna/fasta", f"data.root={root}", "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert "exact copies" in out and "12.50%" in out and "1 pairs" in out
    assert read_csv(output) == [
        {
            "set": "eval", "finding": "exact copies", "name": "1", "label": "no", "other": "1", "other_label": "no",
            "similarity": "1.0000",
        }
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["audit", "vision/digits"], "audit: the task 'vision' has no audit"),
        (["audit", "dna/fsta"], "did you mean 'dna/fasta'"),
        (["audit", "dna/fasta", "--output", "no/such/pairs.csv"], "no folder 'no/such'"),
        (["audit", "dna/fasta", "--output", "pairs.txt"], "unknown format '.txt'; expected .csv"),
    ],
)
def test_wrong_audits_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_run_says_what_its_sets_share(make_task: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = f"data.root={leaky(tmp_path)}"
    assert make_task("dna/fasta", root).describe()["leakage"] == "train: none; eval: 1 exact copies (12.5%)"
    assert make_task("dna/fasta", root).caveat().startswith("leakage: train: none")
    assert "leakage" not in make_task("dna/fasta", root, "data.audit=false").describe()
    monkeypatch.setattr("mambaverse.tasks.dna.task.AUDITED", 31)
    unknown = "leakage: 32 sequences of 1,920 bases in all are not audited here; `mambaverse audit CONFIG` does it"
    assert make_task("dna/fasta", root).caveat() == unknown
    monkeypatch.setattr("mambaverse.tasks.dna.task.AUDITED", 32)
    assert "1 exact copies" in make_task("dna/fasta", root).caveat()
    monkeypatch.setattr("mambaverse.tasks.dna.task.AUDITED_BASES", 1919)
    assert make_task("dna/fasta", root).caveat() == unknown


def test_a_split_of_relatives_shows_in_the_audit(make_task: Make, tmp_path: Path) -> None:
    relatives = [(s, label, f"g{i}") for i, (s, label) in enumerate(rows(12, 120))]
    family = [("".join(s[j] if j % 40 else "A" for j in range(120)), label, g) for s, label, g in relatives]
    path = write_csv(tmp_path / "x.csv", relatives + family, ("sequence", "label", "genus"))
    apart = make_task("dna/fasta", f"data.root={path}", "data.group=genus").audit()
    mixed = make_task("dna/fasta", f"data.root={path}").audit()
    assert count(apart, "eval", "near neighbours (50%)") + count(apart, "eval", "exact copies") == 0
    assert count(mixed, "eval", "near neighbours (50%)") + count(mixed, "eval", "exact copies") > 4
