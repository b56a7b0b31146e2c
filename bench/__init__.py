"""Measurements: ``python -m bench.precision``."""
