"""Arithmetic on numbers and trees whose values and derivatives do not overflow or underflow."""
