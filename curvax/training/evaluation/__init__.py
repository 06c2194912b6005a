"""Evaluation of trained runs on other sets: ImageNet's variants, corruptions, image folders."""
