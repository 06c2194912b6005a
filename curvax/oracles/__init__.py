"""A loss and a point ↦ a linear map v ↦ C v."""

from curvax.oracles.fisher import fvp, linearized_fisher
from curvax.oracles.gauss_newton import ggnvp, linearized_gauss_newton
from curvax.oracles.hessian import hvp, linearized_hessian
from curvax.oracles.per_example import empirical_fvp, linearized_empirical_fisher

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
