"""Helpers of the tests: small data sets and models, servers, process groups, network namespaces, fake devices."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""Of the repository."""
CONFIGS = ROOT / "configs"
FIXTURES = ROOT / "tests" / "fixtures"
