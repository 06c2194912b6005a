"""The error for what a command was given, and all errors that it reports without a traceback.

An error class of its own stands where it is raised, and only if some code or a caller tells it from
others: `DataError`, `CheckpointError`, `NotFinite`, `Stopped`, `Refused`, `ProcessLost`.
"""

EXPECTED = (ValueError, TypeError, OSError, ArithmeticError)
"""Errors whose message is enough: wrong input, the file system, a loss that is not finite."""


class ConfigError(ValueError):
    """A config, an option or a run folder that cannot be used; the message names the cure."""
