"""Modules that the incumbent calls experimental."""
