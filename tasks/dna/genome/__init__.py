"""Genomes in files: FASTA with random access, regions, BED, VCF, GenBank features and bedGraph tracks."""

from mambaverse.tasks.dna.genome.fasta import Genome, open_genome
from mambaverse.tasks.dna.genome.regions import Region, parse_region

__all__ = ["Genome", "Region", "open_genome", "parse_region"]
