"""Computations written for speed: plain torch here, Triton in ``triton``, the same results from both."""
