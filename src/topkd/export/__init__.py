"""Export: a student for other runtimes, and for the Hugging Face hub."""
