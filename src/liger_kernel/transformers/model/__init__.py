"""Pieces of the public API that the incumbent keeps under `transformers.model`."""
