"""Formulas of the papers in plain loops over Python numbers, to compare the package with."""
