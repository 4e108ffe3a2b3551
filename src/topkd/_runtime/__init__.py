"""Processor, processes and memory: what the machine does, and what is chosen for it."""
