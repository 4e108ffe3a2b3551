"""Small networks out of large ones, which keep the shape of what the large ones know."""

__version__ = "0.1.0"
