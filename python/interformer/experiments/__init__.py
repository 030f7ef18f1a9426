"""Grids of models and seeds from YAML files: every run in its own process, with a table and plots of the results."""
