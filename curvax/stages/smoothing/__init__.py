"""Smoothing of a diagonal: over neighbouring weights, over steps, and between estimates."""

from curvax.stages.smoothing.every import every
from curvax.stages.smoothing.moments import accumulate, ema_mean, ema_rms
from curvax.stages.smoothing.spatial import spatial_average

__all__ = ["accumulate", "ema_mean", "ema_rms", "every", "spatial_average"]
