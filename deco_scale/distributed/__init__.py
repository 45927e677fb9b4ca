"""Process group, collectives on Python objects, stop signals and replica checks; no model."""
