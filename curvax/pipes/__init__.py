"""The pipe: signals, stages, the order they may stand in, and the diagnostics they keep."""
