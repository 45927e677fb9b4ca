"""Conversions between the canonical checkpoint and what others read and write."""
