"""Training: the stages of an experiment, the loop, the terms of the loss, checks beforehand."""
