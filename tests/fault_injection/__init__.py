"""Injected faults: broken stores and files, killed processes, hangs; in chaos/ whole runs under random faults."""
