"""Speed of saving and resharding."""
