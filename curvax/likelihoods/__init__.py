"""Likelihoods as losses: they provide ∇²ℓ in the outputs, a root of it, and samples of labels."""

from curvax.likelihoods.families import bernoulli, categorical, gaussian, poisson
from curvax.likelihoods.likelihood import Likelihood

__all__ = ["Likelihood", "bernoulli", "categorical", "gaussian", "poisson"]
