"""A loss and a point ↦ a linear map v ↦ C v."""

from curvax.oracles.fisher import fvp
from curvax.oracles.gauss_newton import ggnvp
from curvax.oracles.hessian import hvp
from curvax.oracles.per_example import empirical_fvp

__all__ = ["empirical_fvp", "fvp", "ggnvp", "hvp"]
