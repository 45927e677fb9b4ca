"""Speed of the data pipeline."""
