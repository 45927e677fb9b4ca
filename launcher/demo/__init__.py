"""The demo (``make demo``): the full workflow on a small data set."""
