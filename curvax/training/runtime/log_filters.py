"""Filters for log messages that repeat an error raised here, or that tell nothing."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

_ONE_HOST = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_HOST_BOUNDS": "1,1,1"}


def silence_libtpu(devices: Path = Path("/dev")) -> None:
    """Keeps libtpu from logging failed queries on a machine without a TPU.

    A TPU is recognised by its device files, `accel*` and `vfio/*`. Call this before JAX initialises
    its devices.
    """
    if not any(devices.glob("accel*")) and not any(devices.glob("vfio/*")):
        for name, value in _ONE_HOST.items():
            os.environ.setdefault(name, value)


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
