"""Lets ``python -m topkd`` do what ``topkd`` does."""

from topkd.cli import main

main()
