"""Outputs and targets ↦ a loss that also knows ∇²ℓ, its root, and how to sample labels."""

from curvax.likelihoods.families import bernoulli, categorical, gaussian, poisson
from curvax.likelihoods.likelihood import Likelihood

__all__ = ["Likelihood", "bernoulli", "categorical", "gaussian", "poisson"]
