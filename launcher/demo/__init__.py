"""The demo: the main job end to end on a small data set, by ``make demo``."""
