"""Libraries that log what is raised here anyway, or what nobody needs to know, kept silent."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

_ONE_HOST = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_HOST_BOUNDS": "1,1,1"}


def silence_libtpu(devices: Path = Path("/dev")) -> None:
    """Keeps libtpu, where it is installed and no TPU is, from saying what it did not hear of one.

    It goes by the device files of TPUs, `accel*` and `vfio/*`, and must come before JAX has made
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
