"""Libraries that log what is raised here anyway, or what nobody needs to know, kept silent."""

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def silent_log() -> Iterator[None]:
    """Keeps Orbax from logging."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
