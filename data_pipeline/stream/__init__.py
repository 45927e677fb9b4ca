"""A run's samples in order: sampler, mixture, chunk reader, loader."""
