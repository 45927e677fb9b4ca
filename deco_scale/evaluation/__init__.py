"""Figures of merit of pictures."""
