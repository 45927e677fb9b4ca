"""The FSDP2 and DeepSpeed engines behind one interface."""
