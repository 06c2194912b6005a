"""Errors that a command reports by their message, without a traceback.

Errors that are caught by class are defined where they are raised: `DataError`, `CheckpointError`,
`NotFinite`, `Stopped`, `Refused` and `ProcessLost`. What is wrong with a command's input is a
`ConfigError`.
"""

EXPECTED = (ValueError, TypeError, OSError, ArithmeticError)
"""Errors whose message is enough: wrong input, the file system, a loss that is not finite."""


class ConfigError(ValueError):
    """A config, an option or a run folder that cannot be used; the message names the cure."""
