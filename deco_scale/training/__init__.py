"""The loop, the one step, the optimizer, checkpoints and reports."""
