"""Fault detection: a sidecar process beside each rank notices hung and lost ranks and ends the whole job."""
