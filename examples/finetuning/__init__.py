"""Adapters on a model that has read this repository's code; they learn its documentation."""
