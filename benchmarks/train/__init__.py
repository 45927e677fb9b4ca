"""The training step: what throughput and the GPU suite measure, and the eager reference."""
