"""Trained runs ↦ the geometry of their losses: numbers, pictures, and a page that compares them."""
