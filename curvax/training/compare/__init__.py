"""Runs compared: several methods over seeds, grids of settings, tables, plots, costs."""
