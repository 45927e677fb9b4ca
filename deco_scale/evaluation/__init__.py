"""Scores of generated images: FID, CLIP score, GenEval, DPG-Bench, spectra."""
