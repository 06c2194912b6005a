"""Comparison of methods over seeds and settings: tables, plots, costs."""
