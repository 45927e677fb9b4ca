"""Fused computations: plain torch here, Triton in ``triton``, with the same results."""
