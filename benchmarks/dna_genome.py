"""Times what reads a genome: random slices, opening, indexing, the reverse complement, VCF, intervals and tracks.

python benchmarks/dna_genome.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mambaverse.tasks.dna.genome import Genome
from mambaverse.tasks.dna.genome.bgzf import to_bgzf
from mambaverse.tasks.dna.genome.intervals import Intervals
from mambaverse.tasks.dna.genome.regions import Region
from mambaverse.tasks.dna.genome.tracks import BedGraphWriter
from mambaverse.tasks.dna.genome.variants import normalise
from mambaverse.tasks.dna.genome.vcf import read_vcf
from mambaverse.tasks.dna.tokens import reverse_complement

REPEAT = 5
BASES, WIDTH, SLICES, SLICE = 20_000_000, 80, 1000, 1000
LONG = 3_000_000_000  # of a human genome
VARIANTS = 20_000
PEAK = """
import sys
from mambaverse.tasks.dna.genome import Genome
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
before = peak()
Genome(sys.argv[1])
print(f"indexing took {peak() - before:.0f} MiB beyond the imports")
"""  # a process of its own: here the peak is that of what was before


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def best(run: Callable[[], object]) -> float:
    """Return the shortest of some runs, in seconds."""
    return min(seconds(run) for _ in range(REPEAT))


def write_fasta(path: Path, records: int, bases: int, alphabet: bytes = b"ACGTacgtN") -> np.ndarray:
    """Write so many records of the same letters, and return these."""
    letters = np.random.default_rng(0).choice(np.frombuffer(alphabet, np.uint8), bases)
    lines = np.pad(letters.reshape(-1, WIDTH), ((0, 0), (0, 1)), constant_values=ord("\n"))
    with path.open("wb") as file:
        for number in range(records):
            file.write(b">chr%d\n" % (number + 1))
            lines.tofile(file)
    return letters


def slices(folder: Path) -> Genome:
    path = folder / "genome.fa"
    letters = write_fasta(path, 1, BASES)
    compressed = to_bgzf(path)
    starts = np.random.default_rng(1).integers(0, BASES - SLICE, SLICES).tolist()
    for name, file in {"plain": path, "BGZF": compressed}.items():
        made = seconds(lambda file=file: Genome(file))
        opened = best(lambda file=file: Genome(file).close())
        genomes = iter([Genome(file) for _ in range(REPEAT)])  # each with an empty cache

        def read(genomes=genomes) -> None:
            genome = next(genomes)
            for start in starts:
                genome.fetch("chr1", start, start + SLICE)

        taken = best(read)
        genome = Genome(file)
        assert all(genome.fetch("chr1", s, s + SLICE) == letters[s : s + SLICE].tobytes() for s in starts)
        print(f"{name}: {SLICES:,} random slices of {SLICE:,} bases of {BASES:,}: {1e3 * taken:.1f} ms")
        print(f"{name}: indexed in {1e3 * made:.0f} ms, opened with its index in {1e3 * opened:.2f} ms")
    return Genome(path)


def long_genome(folder: Path) -> None:
    path = folder / "long.fa"
    write_fasta(path, LONG // 100_000_000, 100_000_000)
    made = seconds(lambda: subprocess.run([sys.executable, "-c", PEAK, str(path)], check=True))
    opened = best(lambda: Genome(path).close())
    path.unlink()
    print(f"{LONG:,} bases: indexed in {made:.1f} s (with the start of Python), opened in {1e3 * opened:.2f} ms")


def variants(folder: Path, genome: Genome) -> None:
    places = np.sort(np.random.default_rng(2).integers(0, BASES - 1, VARIANTS)).tolist()
    path = folder / "x.vcf"
    with path.open("w") as file:
        file.write("##fileformat=VCFv4.3\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n")
        for place in places:
            ref = genome["chr1"][place].decode().upper()
            file.write(f"1\t{place + 1}\t.\t{ref}\t{'A' if ref != 'A' else 'C'},{ref}A\t.\t.\t.\n")
    rate = 2 * VARIANTS / best(lambda: list(read_vcf(path, genome=genome)))
    read = list(read_vcf(path, genome=genome))
    form = len(read) / best(lambda: [normalise(variant, genome) for variant in read])
    print(f"VCF: {rate:,.0f} variants/s, REF checked; {form:,.0f} normal forms/s")


def intervals_and_tracks(folder: Path) -> None:
    start = np.random.default_rng(3).integers(0, 10**8, 10**6)
    many = Intervals(("chr1",), np.zeros(10**6, np.int64), start, start + 200)
    print(f"intervals: overlaps of 1,000,000 with 1,000,000 counted in {best(lambda: many.count_overlaps(many)):.2f} s")
    values = np.random.default_rng(4).standard_normal(10**6)

    def write() -> None:
        with BedGraphWriter(folder / "x.bedgraph", {"chr1": 10**6}, overwrite=True) as track:
            track.write(Region("chr1", 0, 10**6), values)

    print(f"bedGraph: {len(values) / best(write):,.0f} values/s, no two alike")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        genome = slices(folder)
        letters = genome.fetch("chr1", 0, 1_000_000)
        print(f"reverse complement of 1 Mb: {1e3 * best(lambda: reverse_complement(letters)):.2f} ms")
        variants(folder, genome)
        intervals_and_tracks(folder)
        long_genome(folder)


if __name__ == "__main__":
    main()
