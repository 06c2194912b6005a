"""Data sets, and batches of their examples."""
