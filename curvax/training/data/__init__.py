"""Data sets: where examples come from, and the batches that are made of them."""
