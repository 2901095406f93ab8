"""Lenses in files, on the hub, and merged."""
