"""Reports: pages, tables and plots of finished runs."""
