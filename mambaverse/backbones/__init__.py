"""Stacks of blocks that know no domain: tokens (B, L, D) in, tokens (B, L, D) out."""
