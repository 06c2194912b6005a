"""A loss and a point ↦ a linear map v ↦ C v."""

from curvax.oracles.hessian import hvp

__all__ = ["hvp"]
