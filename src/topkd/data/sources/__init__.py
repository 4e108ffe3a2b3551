"""Data sources, one in each module."""
