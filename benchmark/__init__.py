"""Measures the library beside its peers: `python -m benchmark --help`."""
