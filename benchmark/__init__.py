"""Compares methods on data sets, and measures speed and memory. Run it from a clone: `python -m benchmark --help`."""
