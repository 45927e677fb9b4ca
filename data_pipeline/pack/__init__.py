"""Shards: reading sources, writing, verifying."""
