"""Studies: planning, running and analyzing a grid of runs."""
