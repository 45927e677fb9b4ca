"""Checks of all nodes before training: versions, configuration, devices, network, storage and data."""
