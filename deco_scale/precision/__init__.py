"""Which number format computes: fp32, bf16 by autocast over fp32 weights, or FP8 in the linears of the blocks."""
