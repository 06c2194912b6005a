"""Solvers, eigenvalues, traces and spectra of a symmetric linear map v ↦ C v, given as a callable.

No module of this package knows about losses or models.
"""

from typing import Any

from curvax import checks
from curvax.linalg.cg import cg
from curvax.linalg.dense import dense
from curvax.linalg.eigenpairs import Eigenpairs, eigenpairs
from curvax.linalg.flatten import materialize
from curvax.linalg.hutchinson import Estimate, estimate_diagonal, estimate_trace, exact_diagonal
from curvax.linalg.kronecker import kronecker
from curvax.linalg.lanczos import Lanczos, lanczos
from curvax.linalg.power import Eigenpair, power_iteration
from curvax.linalg.probes import gaussian_probe, rademacher
from curvax.linalg.row_space import row_space
from curvax.linalg.solvers import Solution, Solver, StopReason
from curvax.linalg.spectral_density import SpectralDensity, spectral_density
from curvax.linalg.steihaug import steihaug

__all__ = [
    "Eigenpair",
    "Eigenpairs",
    "Estimate",
    "Lanczos",
    "Solution",
    "Solver",
    "SpectralDensity",
    "StopReason",
    "cg",
    "dense",
    "eigenpairs",
    "estimate_diagonal",
    "estimate_trace",
    "exact_diagonal",
    "gaussian_probe",
    "kronecker",
    "lanczos",
    "materialize",
    "power_iteration",
    "rademacher",
    "row_space",
    "spectral_density",
    "steihaug",
]


def __getattr__(name: str) -> Any:
    """Resolves the deprecated name `Reason`."""
    if name == "Reason":
        checks.warn_renamed(f"{__name__}.{name}", f"{__name__}.StopReason")
        return StopReason
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
