"""Measures of activations and attention inside a model, without hooks in its code."""
