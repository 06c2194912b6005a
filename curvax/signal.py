"""Deprecated: the public names of this module are those of `curvax`."""

from typing import Any

from curvax import checks
from curvax.pipes import signal

MOVED = ("Signal", "Stage", "pipe", "stage")


def __getattr__(name: str) -> Any:
    if name not in MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    checks.warn_renamed(f"{__name__}.{name}", f"curvax.{name}")
    return getattr(signal, name)
