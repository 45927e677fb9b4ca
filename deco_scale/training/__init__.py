"""The trainer and its callbacks, the training step and its inputs, anomaly detection, metrics."""
