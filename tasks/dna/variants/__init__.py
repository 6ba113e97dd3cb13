"""What a model says of variants: windows of both alleles, scores, and tables that a killed job goes on with."""
