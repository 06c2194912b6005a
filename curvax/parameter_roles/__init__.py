"""Parameter roles: what each leaf of a parameter tree is, and which axes of it are what."""
