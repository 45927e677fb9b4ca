"""Conversions between the canonical checkpoint and the formats of other programs."""
