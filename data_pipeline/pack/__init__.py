"""Tar shards: reading sources, writing, verifying."""
