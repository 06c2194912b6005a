"""A product ↦ a number, a diagonal, a direction; nothing here ever sees a loss."""

from curvax.linalg.ascent import (
    Ascent,
    asam,
    asam_all,
    dual_norm,
    random_direction,
    weight_scaled,
)
from curvax.linalg.estimates import Estimate, estimate_diagonal, estimate_trace
from curvax.linalg.power import Eigenpair, power_iteration
from curvax.linalg.probes import gaussian_probe, rademacher

__all__ = [
    "Ascent",
    "Eigenpair",
    "Estimate",
    "asam",
    "asam_all",
    "dual_norm",
    "estimate_diagonal",
    "estimate_trace",
    "gaussian_probe",
    "power_iteration",
    "rademacher",
    "random_direction",
    "weight_scaled",
]
