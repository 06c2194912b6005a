"""A product ↦ a number, a diagonal, a direction; nothing here ever sees a loss."""

from curvax.linalg.ascent import (
    Ascent,
    MetricAscent,
    asam,
    asam_all,
    dual_norm,
    random_direction,
    weight_scaled,
)
from curvax.linalg.conjugate_gradients import cg
from curvax.linalg.direct import dense
from curvax.linalg.estimates import Estimate, estimate_diagonal, estimate_trace, exact_diagonal
from curvax.linalg.kernel import row_space
from curvax.linalg.power import Eigenpair, power_iteration
from curvax.linalg.probes import gaussian_probe, rademacher
from curvax.linalg.quadrature import SpectralDensity, spectral_density
from curvax.linalg.restarted import Eigenpairs, eigenpairs
from curvax.linalg.solvers import Reason, Solution, Solver
from curvax.linalg.tridiagonal import Lanczos, lanczos
from curvax.linalg.truncated_cg import steihaug
from curvax.linalg.vectors import materialize

__all__ = [
    "Ascent",
    "Eigenpair",
    "Eigenpairs",
    "Estimate",
    "Lanczos",
    "MetricAscent",
    "Reason",
    "Solution",
    "Solver",
    "SpectralDensity",
    "asam",
    "asam_all",
    "cg",
    "dense",
    "dual_norm",
    "eigenpairs",
    "estimate_diagonal",
    "estimate_trace",
    "exact_diagonal",
    "gaussian_probe",
    "lanczos",
    "materialize",
    "power_iteration",
    "rademacher",
    "random_direction",
    "row_space",
    "spectral_density",
    "steihaug",
    "weight_scaled",
]
