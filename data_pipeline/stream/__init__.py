"""Samples of a run in their order: sampler, mixture, chunk reader, loader."""
