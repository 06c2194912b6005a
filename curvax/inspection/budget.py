"""A time budget: estimates of the cost of measures, corrected by the time actually spent."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import jax

from curvax.inspection.checkpoint_loss import CheckpointLoss, gradient

Clock = Callable[[], float]
_PACE = 0.2, 5.0
"""Bounds of the correction factor of estimates."""


class Work(NamedTuple):
    """The work of a measure, in equivalents of compilations and of gradients."""

    compilations: float
    gradients: float


class Price(NamedTuple):
    """The seconds of a unit of work for one checkpoint."""

    compilation: float  # of a gradient; near 0 for a model compiled before
    gradient: float

    def of(self, work: Work) -> float:
        return work.compilations * self.compilation + work.gradients * self.gradient


def price(point: CheckpointLoss, clock: Clock = time.perf_counter) -> Price:
    """Times a gradient: the first evaluation includes its compilation."""

    def seconds() -> float:
        began = clock()
        jax.block_until_ready(gradient(point.objective, point.params))
        return clock() - began

    first, again = seconds(), min(seconds() for _ in range(3))
    return Price(max(0.0, first - again), again)


class Budget:
    """A number of seconds from now on, and the accuracy of estimates so far."""

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
        """The ratio of time taken to time estimated."""
        if not self._estimated:
            return 1.0
        return min(max(self._taken / self._estimated, _PACE[0]), _PACE[1])

    @contextmanager
    def spending(self, estimate: float) -> Iterator[None]:
        """Times the block, to correct further estimates."""
        before = self._clock()
        yield
        self._estimated += estimate
        self._taken += self._clock() - before
