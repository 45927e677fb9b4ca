"""Parallelism applied to a finished model from outside; the model itself knows nothing of it."""
