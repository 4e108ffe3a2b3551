"""Lets ``python -m topkd`` do what ``topkd`` does."""

from topkd.cli.app import main

main()
