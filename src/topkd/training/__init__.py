"""Training: stages of an experiment, training loop, objective and preflight checks."""
