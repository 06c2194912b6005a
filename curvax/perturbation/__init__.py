"""SAM's perturbation: ascent rules, and the ascent in a ball of radius ρ."""

from curvax.perturbation.ascent_rules import (
    Ascent,
    MetricAscent,
    MomentumAscent,
    asam,
    asam_all,
    dual_norm,
    momentum,
    random_direction,
    weight_scaled,
)
from curvax.perturbation.fisher import fisher_ascent
from curvax.perturbation.radius import auto_rho, by_path

__all__ = [
    "Ascent",
    "MetricAscent",
    "MomentumAscent",
    "asam",
    "asam_all",
    "auto_rho",
    "by_path",
    "dual_norm",
    "fisher_ascent",
    "momentum",
    "random_direction",
    "weight_scaled",
]
