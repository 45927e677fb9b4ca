"""Parallelism applied to a finished model from outside, and the engines that train it."""
