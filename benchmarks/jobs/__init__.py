"""Runs jobs with time limits, each in processes of its own."""
