"""A few numbers ↦ their mean, spread and confidence interval."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Summary(NamedTuple):
    """Mean, sample standard deviation and half width of the 95 % interval (NaN for one number)."""

    mean: float
    deviation: float
    half_width: float


def summarise(values: Sequence[float]) -> Summary:
    """Mean ± t₀.₉₇₅(n-1) s/√n, the interval of Student's t for n numbers of unknown spread."""
    n = len(values)
    mean = float(np.mean(values))
    if n < 2:
        return Summary(mean, math.nan, math.nan)
    deviation = float(np.std(values, ddof=1))
    return Summary(mean, deviation, float(stats.t.ppf(0.975, n - 1)) * deviation / math.sqrt(n))
