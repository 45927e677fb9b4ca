"""Checkpoint formats, one module each, as :class:`~checkpoints_tools.base.CheckpointReader`."""
