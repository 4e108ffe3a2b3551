"""Atomic files, sealed weights, resumable state and progress bars."""
