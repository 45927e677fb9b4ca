"""Triton kernels of :mod:`deco_scale.kernels`; none has run on a GPU yet."""
