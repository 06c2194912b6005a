"""Losses of several landscapes ↦ a common scale with its colours, levels and ticks."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import MaxNLocator

LEVELS = 24
Limits = tuple[float, float]


class Scale(NamedTuple):
    """A linear or logarithmic scale from the lowest to the highest loss shown."""

    low: float
    high: float
    logarithmic: bool

    @property
    def norm(self) -> Normalize:
        return (LogNorm if self.logarithmic else Normalize)(self.low, self.high)

    @property
    def levels(self) -> np.ndarray:
        return (np.geomspace if self.logarithmic else np.linspace)(self.low, self.high, LEVELS)

    @property
    def ticks(self) -> np.ndarray:
        """Round numbers; on a logarithmic scale powers of ten, also times 2 and 5 if few."""
        if not self.logarithmic:
            ticks = np.asarray(MaxNLocator(6).tick_values(self.low, self.high))
        else:
            decades = 10.0 ** np.arange(np.floor(np.log10(self.low)), np.log10(self.high) + 1)
            ticks = np.outer(decades, (1,) if len(decades) > 5 else (1, 2, 5)).ravel()
        return ticks[(ticks >= self.low) & (ticks <= self.high)]

    def beyond(self, losses: np.ndarray) -> str:
        """The ends of the scale that losses exceed: matplotlib's `extend` option."""
        ends = bool(np.nanmin(losses) < self.low), bool(np.nanmax(losses) > self.high)
        return {(True, True): "both", (True, False): "min", (False, True): "max"}.get(
            ends, "neither"
        )


def scale_of(
    losses: Sequence[np.ndarray], limits: Limits | None = None, logarithmic: bool | None = None
) -> Scale:
    """Chooses the common scale.

    Args:
        losses: the losses of each landscape.
        limits: (low, high); by default those of the finite losses.
        logarithmic: by default for planes whose losses are positive and span a factor of ten.

    Raises:
        ValueError: no loss is finite.
    """
    all_ = np.concatenate([np.ravel(each) for each in losses])
    finite = all_[np.isfinite(all_)]
    if not finite.size:
        raise ValueError(
            "A landscape is drawn where the loss is finite, and here it is finite nowhere. Use a "
            "smaller `span=`, around a point of finite loss."
        )
    low, high = limits or (float(finite.min()), float(finite.max()))
    if logarithmic is None:
        logarithmic = losses[0].ndim == 2 and 0 < 10 * low < high
    if not low < high:
        low, high = low - 0.5 * abs(low) - 1e-9, high + 0.5 * abs(high) + 1e-9
    return Scale(low, high, logarithmic)
