"""Products with curvature matrices: a loss and a point ↦ a linear map v ↦ C v.

C is the Hessian (`hvp`), the Gauss-Newton matrix (`ggnvp`), the Fisher matrix (`fvp`), the
empirical Fisher matrix (`empirical_fvp`), or the Fisher matrix in Kronecker factors
(`kronecker_factors`).
"""

from curvax.curvature.empirical_fisher import empirical_fvp, linearized_empirical_fisher
from curvax.curvature.fisher import fvp, linearized_fisher
from curvax.curvature.gauss_newton import ggnvp, linearized_gauss_newton
from curvax.curvature.hessian import hvp, linearized_hessian
from curvax.curvature.kronecker import (
    CorrectedFactors,
    KroneckerFactors,
    LeafReport,
    kronecker_factors,
)

__all__ = [
    "CorrectedFactors",
    "KroneckerFactors",
    "LeafReport",
    "empirical_fvp",
    "fvp",
    "ggnvp",
    "hvp",
    "kronecker_factors",
    "linearized_empirical_fisher",
    "linearized_fisher",
    "linearized_gauss_newton",
    "linearized_hessian",
]
