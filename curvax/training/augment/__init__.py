"""Augmentation and preprocessing of batches, and metrics."""
