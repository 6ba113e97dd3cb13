"""What a model makes of DNA, base by base: mutagenesis, embeddings and tracks along a genome."""
