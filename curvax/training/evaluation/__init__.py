"""Trained runs on other test sets: ImageNet's variants, corruptions, folders of images."""
