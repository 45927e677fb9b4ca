"""Mixed precision: fp32, bf16 autocast over fp32 weights, or FP8 linears in the blocks."""
