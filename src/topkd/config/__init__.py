"""Recipes: their schema and their validation. Knows no network and no data."""
