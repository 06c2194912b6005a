"""Seconds that may be spent ↦ which measures fit, by estimates that learn from what was spent."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import jax

from curvax.inspection.checkpoint_loss import CheckpointLoss, gradient

Clock = Callable[[], float]
_PACE = 0.2, 5.0
"""How far the estimates may be off before they are trusted more than the clock."""


class Work(NamedTuple):
    """What a measure takes: programs to compile and gradients, or what costs as much."""

    compilations: float
    gradients: float


class Price(NamedTuple):
    """What work costs at a point, in seconds."""

    compilation: float  # of a gradient; next to nothing for a model that was compiled before
    gradient: float

    def of(self, work: Work) -> float:
        return work.compilations * self.compilation + work.gradients * self.gradient


def price(point: CheckpointLoss, clock: Clock = time.perf_counter) -> Price:
    """Takes a gradient a few times: the first time it is compiled."""

    def seconds() -> float:
        began = clock()
        jax.block_until_ready(gradient(point.objective, point.params))
        return clock() - began

    first, again = seconds(), min(seconds() for _ in range(3))
    return Price(max(0.0, first - again), again)


class Budget:
    """Seconds from now on, and how the estimates have kept so far."""

    def __init__(self, seconds: float, clock: Clock = time.perf_counter):
        self.seconds = seconds
        self._clock, self._began = clock, clock()
        self._estimated = self._taken = 0.0

    @property
    def spent(self) -> float:
        return self._clock() - self._began

    @property
    def left(self) -> float:
        return max(0.0, self.seconds - self.spent)

    @property
    def pace(self) -> float:
        """Seconds taken for each that was estimated."""
        if not self._estimated:
            return 1.0
        return min(max(self._taken / self._estimated, _PACE[0]), _PACE[1])

    @contextmanager
    def spending(self, estimate: float) -> Iterator[None]:
        """Learns from what is done inside how good the estimate was."""
        before = self._clock()
        yield
        self._estimated += estimate
        self._taken += self._clock() - before
