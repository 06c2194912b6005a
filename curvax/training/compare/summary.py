"""Mean, standard deviation and confidence interval of a few numbers."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Summary(NamedTuple):
    """Mean, sample standard deviation and half width of the 95 % interval; NaN for one number."""

    mean: float
    deviation: float
    half_width: float


def summarise(values: Sequence[float]) -> Summary:
    """The mean with Student's interval for n normal numbers of unknown variance.

    x̄ ± t₀.₉₇₅(n-1) s / √n
    """
    n = len(values)
    mean = float(np.mean(values))
    if n < 2:
        return Summary(mean, math.nan, math.nan)
    from scipy import stats  # half a second

    deviation = float(np.std(values, ddof=1))
    return Summary(mean, deviation, float(stats.t.ppf(0.975, n - 1)) * deviation / math.sqrt(n))
