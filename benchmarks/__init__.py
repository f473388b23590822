"""Figures, each beside its baseline in one run: `python -m benchmarks.NAME`."""
