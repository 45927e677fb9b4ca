"""Jobs of the GPU suite."""
