"""Augmentation and preprocessing: what happens to a batch before the model sees it."""
