"""Measurements that anyone can repeat; each is a ratio or a median within one run."""
