"""Experiments: data, augmentation, training loop, checkpoints, comparison and evaluation."""
