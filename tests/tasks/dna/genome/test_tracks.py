"""bedGraph: what a scan writes, and that a scan which was killed ends with the same bytes."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mambaverse.engine import resumable
from mambaverse.engine.files import SaveError
from mambaverse.tasks.dna.genome import tracks
from mambaverse.tasks.dna.genome.intervals import windows
from mambaverse.tasks.dna.genome.regions import Region
from mambaverse.tasks.dna.genome.tracks import BedGraphWriter, scan_order
from tests.tasks.dna.conftest import fails

LENGTHS = {"chr10": 50, "chr2": 73, "chr1": 120}


def test_equal_neighbours_are_one_line_and_nan_is_none(tmp_path: Path) -> None:
    path = tmp_path / "x.bedgraph"
    with BedGraphWriter(path, LENGTHS) as track:
        track.write(Region("chr1", 0, 6), np.array([1, 1, np.nan, np.nan, 2.5, 2.5]))
        track.write(Region("chr1", 6, 8), np.array([2.5, -0.0]))
        track.write(Region("chr1", 8, 10), np.array([0.0000004, 1 / 3]))
        track.write(Region("chr10", 0, 9), np.array([1 / 3, 1 / 3 + 1e-9, 7.0]), step=4)
        track.write(Region("chr10", 9, 9), np.zeros(0))
        track.write(Region("chr2", 40, 50, "-"), np.array([np.nan]), step=10)
        track.write(Region("chr2", 50, 73), np.array([7.0]), step=30)
    assert path.read_text().splitlines() == [
        "chr1\t0\t2\t1",
        "chr1\t4\t7\t2.5",
        "chr1\t7\t8\t0",
        "chr1\t8\t9\t4e-07",
        "chr1\t9\t10\t0.333333",
        "chr10\t0\t8\t0.333333",
        "chr10\t8\t9\t7",
        "chr2\t50\t73\t7",
    ]
    assert (tmp_path / "x.chrom.sizes").read_text() == "chr1\t120\nchr10\t50\nchr2\t73\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.bedgraph", "x.chrom.sizes"]


def values_of(region: Region) -> np.ndarray:
    draw = np.random.default_rng([region.start, len(region)])
    return draw.choice([0.5, 0.25, np.nan], len(region), p=[0.6, 0.2, 0.2])


def regions() -> list[Region]:
    return [
        Region(name, int(start), int(end))
        for name in scan_order(list(LENGTHS))
        for start, end in windows(Region(name, 0, LENGTHS[name]), 10, tail="short")
    ]


def scan(path: Path, *, killed_after: int | None = None, checkpoint_at: tuple[int, ...] = ()) -> int:
    """Scan, or begin to and stop without any farewell; return how many regions were computed."""
    track = BedGraphWriter(path, LENGTHS, resume=True, about="model a")
    computed = 0
    for region in regions():
        if track.has(region):
            continue
        track.write(region, values_of(region))
        computed += 1
        if computed in checkpoint_at:
            track.checkpoint()
        if computed == killed_after:
            track._file.close()  # what is buffered may reach the disk or not
            return computed
    track.finish()
    return computed


@pytest.mark.parametrize("seed", range(10))
def test_a_scan_that_was_killed_ends_with_the_same_bytes(tmp_path: Path, seed: int) -> None:
    whole, cut = tmp_path / "whole.bedgraph", tmp_path / "cut.bedgraph"
    total = scan(whole)
    draw, computed, runs = random.Random(seed), 0, 0
    while not cut.exists():
        after = draw.randint(3, 12)
        computed += scan(cut, killed_after=after, checkpoint_at=(draw.randint(1, 3), after - draw.randint(0, 1)))
        runs += 1
    assert cut.read_bytes() == whole.read_bytes()
    assert total <= computed <= total + 2 * runs  # nothing but what lay behind a checkpoint is computed again
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob("*.checkpoint"))


def test_an_error_in_the_scan_leaves_a_part_to_go_on_with(tmp_path: Path) -> None:
    path = tmp_path / "x.bedgraph"
    with pytest.raises(KeyboardInterrupt), BedGraphWriter(path, LENGTHS) as track:
        track.write(Region("chr1", 0, 2), np.ones(2))
        raise KeyboardInterrupt
    assert not path.exists()
    with BedGraphWriter(path, LENGTHS, resume=True) as track:
        assert track.done == Region("chr1", 0, 2) and track.has(Region("chr1", 0, 2))
        assert not track.has(Region("chr1", 1, 3)) and not track.has(Region("chr10", 0, 1))
        track.write(Region("chr1", 2, 3), np.ones(1))
    assert path.read_text() == "chr1\t0\t3\t1\n"


def test_an_error_while_a_region_is_written_keeps_the_region_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.bedgraph"
    track = BedGraphWriter(path, LENGTHS)
    track.write(Region("chr1", 0, 2), np.ones(2))
    track.checkpoint()
    with pytest.raises(KeyboardInterrupt), track:
        track.write(Region("chr1", 2, 3), np.zeros(1))
        real = tracks.BedGraphWriter._add

        def interrupted(self: BedGraphWriter, *arguments: Any) -> None:
            real(self, *arguments)
            raise KeyboardInterrupt

        monkeypatch.setattr(BedGraphWriter, "_add", interrupted)
        track.write(Region("chr1", 3, 5), np.array([4.0, 5.0]))
    monkeypatch.undo()
    with BedGraphWriter(path, LENGTHS, resume=True) as track:
        assert track.done == Region("chr1", 0, 2)
        track.write(Region("chr1", 2, 3), np.zeros(1))
    assert path.read_text() == "chr1\t0\t2\t1\nchr1\t2\t3\t0\n"


def test_a_long_scan_saves_where_it_is_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumable, "EVERY_S", 0.0)
    track = BedGraphWriter(tmp_path / "x.bedgraph", LENGTHS)
    for start in range(5):
        track.write(Region("chr1", start, start + 1), np.array([start]))
        assert json.loads((tmp_path / "x.bedgraph.checkpoint").read_text())["done"] == ["chr1", start, start + 1]
    track.finish()


@pytest.mark.parametrize(
    ("region", "values", "step", "message"),
    [
        (
            Region("chr1", 5, 9),
            np.ones(4),
            1,
            "chr1:6-9 behind chr10:1-9: not sorted, or overlapping; scan chromosomes",
        ),
        (Region("chr10", 8, 9), np.ones(1), 1, "not sorted, or overlapping"),
        (Region("chr10", 40, 51), np.ones(11), 1, "chr10:41-51 is past the end of chr10 (50 bases)"),
        (Region("chr3", 0, 1), np.ones(1), 1, "no chromosome 'chr3', did you mean"),
        (Region("chr2", 0, 9), np.ones(4), 2, "values (4,); expected one for each 2 bases"),
        (Region("chr2", 0, 1), np.array([np.inf]), 1, "an infinite value; expected numbers, or NaN for none"),
    ],
)
def test_what_cannot_be_in_a_track_is_named(
    tmp_path: Path, region: Region, values: np.ndarray, step: int, message: str
) -> None:
    track = BedGraphWriter(tmp_path / "x.bedgraph", LENGTHS)
    track.write(Region("chr10", 0, 9), np.zeros(9))
    assert message in fails(lambda: track.write(region, values, step))
    track.finish()


def test_nothing_is_overwritten_or_mixed_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "x.bedgraph"
    scan(path, killed_after=5, checkpoint_at=(5,))
    message = fails(lambda: BedGraphWriter(path, LENGTHS, resume=True, about="model b"))
    assert "a track of another genome or other numbers ('model a'); expected 'model b'" in message
    assert "another genome" in fails(lambda: BedGraphWriter(path, {"chr1": 5}, resume=True, about="model a"))
    part, mark = path.with_name("x.bedgraph.part"), path.with_name("x.bedgraph.checkpoint")
    saved = part.read_bytes()
    part.write_bytes(saved[:5])
    assert "shorter than" in fails(lambda: scan(path))
    part.write_bytes(saved)
    state = mark.read_text()
    mark.write_text(state[:-9])
    assert "x.bedgraph.checkpoint: damaged; delete it and" in fails(lambda: scan(path))
    mark.write_text(state)
    scan(path)
    assert "is there already, finished" in fails(lambda: BedGraphWriter(path, LENGTHS))
    BedGraphWriter(path, LENGTHS, overwrite=True).finish()
    assert path.read_text() == ""
    with pytest.raises(SaveError, match="cannot write"):
        BedGraphWriter(tmp_path / "no/x.bedgraph", LENGTHS)


def test_chromosome_sizes_of_another_genome_are_not_replaced(tmp_path: Path) -> None:
    sizes = tmp_path / "x.chrom.sizes"
    sizes.write_text("chr1\t5\n")
    told = fails(BedGraphWriter, tmp_path / "x.bedgraph", LENGTHS)
    assert told.startswith(f"{sizes}: is there already, of other chromosomes; name another file")
    assert sizes.read_text() == "chr1\t5\n"
    BedGraphWriter(tmp_path / "x.bedgraph", LENGTHS, overwrite=True).finish()
    assert sizes.read_text().startswith("chr1\t120\n")
