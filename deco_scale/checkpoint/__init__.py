"""Checkpoints of a run: saving beside training, retention, loading, and the canonical format."""
