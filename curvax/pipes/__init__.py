"""Pipes: signals, stages, the order of stages, and diagnostics."""
