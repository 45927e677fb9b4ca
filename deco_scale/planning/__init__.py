"""Costs of a configuration, from its numbers alone."""
