"""What a data set holds: the index's format, making it, filtering it."""
