"""The index of a data set: its format, building it, filtering it."""
