"""Attention backends: their dispatch, the packages that provide them, and the measurement that ranks them."""
