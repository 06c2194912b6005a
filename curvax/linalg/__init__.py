"""A product ↦ a number, a diagonal, a solution, a spectrum; nothing here ever sees a loss."""

from curvax.linalg.cg import cg
from curvax.linalg.dense import dense
from curvax.linalg.eigenpairs import Eigenpairs, eigenpairs
from curvax.linalg.flatten import materialize
from curvax.linalg.hutchinson import Estimate, estimate_diagonal, estimate_trace, exact_diagonal
from curvax.linalg.lanczos import Lanczos, lanczos
from curvax.linalg.power import Eigenpair, power_iteration
from curvax.linalg.probes import gaussian_probe, rademacher
from curvax.linalg.row_space import row_space
from curvax.linalg.solvers import Reason, Solution, Solver
from curvax.linalg.spectral_density import SpectralDensity, spectral_density
from curvax.linalg.steihaug import steihaug

__all__ = [
    "Eigenpair",
    "Eigenpairs",
    "Estimate",
    "Lanczos",
    "Reason",
    "Solution",
    "Solver",
    "SpectralDensity",
    "cg",
    "dense",
    "eigenpairs",
    "estimate_diagonal",
    "estimate_trace",
    "exact_diagonal",
    "gaussian_probe",
    "lanczos",
    "materialize",
    "power_iteration",
    "rademacher",
    "row_space",
    "spectral_density",
    "steihaug",
]
