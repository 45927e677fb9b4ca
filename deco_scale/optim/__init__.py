"""AdamW with gradient clipping and an EMA of the weights, for both engines."""
