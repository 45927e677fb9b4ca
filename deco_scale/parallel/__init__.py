"""Sharding of a finished model over processes; nothing in here is known to the model."""
