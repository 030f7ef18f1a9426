"""Grids of models and seeds from a YAML file: every run in a process of its own, a table and plots of what came out."""
