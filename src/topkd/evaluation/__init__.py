"""Metrics of predictions, results of runs, and statistics over seeds."""
