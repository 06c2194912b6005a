"""Experiments: data, augmentation, the loop, checkpoints, and what runs are compared by."""
