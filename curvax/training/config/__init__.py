"""The config of a run: its fields, and the method as text."""
