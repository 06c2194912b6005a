"""SIGTERM, which schedulers send before they reclaim a machine."""

import itertools
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

_POINTS = itertools.count()
"""Numbers the points at which all processes may stop, through all runs of a program: the runtime
stops them at the first number that no process has reached, which may be in the next run."""


class Stopped(InterruptedError):
    """A run that was asked to terminate, and has saved a checkpoint."""


class Notice:
    """A context manager that records whether the run has been asked to terminate.

    Several processes agree on the step after which they stop by JAX's distributed runtime, which
    handles the signal itself; it may be sent to one process only.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    def __enter__(self) -> "Notice":
        if self._listens():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._listens():
            signal.signal(signal.SIGTERM, self._before)

    def given(self) -> bool:
        """Whether to stop now; the same in all processes, which must call it equally often."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(next(_POINTS))
        return self._asked

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def _listens(self) -> bool:
        alone = jax.process_count() == 1
        return alone and threading.current_thread() is threading.main_thread()
