"""Memory, step time, cost and goodput of a configuration, predicted from its numbers alone."""
