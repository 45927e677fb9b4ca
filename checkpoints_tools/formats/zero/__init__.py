"""DeepSpeed's native ZeRO checkpoints."""
