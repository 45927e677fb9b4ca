"""The ``deco-data`` command."""
