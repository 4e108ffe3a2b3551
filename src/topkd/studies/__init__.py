"""Studies: many runs that belong together, planned, run on executors, and read again."""
