"""Schema and validation of recipes and studies, independent of networks and data."""
