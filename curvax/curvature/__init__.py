"""Products with curvature matrices: a loss and a point ↦ a linear map v ↦ C v.

C is the Hessian (`hvp`), the Gauss-Newton matrix (`ggnvp`), the Fisher matrix (`fvp`) or the
empirical Fisher matrix (`empirical_fvp`).
"""

from curvax.curvature.empirical_fisher import empirical_fvp, linearized_empirical_fisher
from curvax.curvature.fisher import fvp, linearized_fisher
from curvax.curvature.gauss_newton import ggnvp, linearized_gauss_newton
from curvax.curvature.hessian import hvp, linearized_hessian

__all__ = [
    "empirical_fvp",
    "fvp",
    "ggnvp",
    "hvp",
    "linearized_empirical_fisher",
    "linearized_fisher",
    "linearized_gauss_newton",
    "linearized_hessian",
]
