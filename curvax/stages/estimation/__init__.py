"""Estimators: stages that add a diagonal, a product or Kronecker factors to the signal."""

from curvax.stages.estimation.eigenvalues import fisher_eigenvalues
from curvax.stages.estimation.gradient_kronecker import gradient_kronecker
from curvax.stages.estimation.hutchinson import hutchinson_diag
from curvax.stages.estimation.kronecker import (
    empirical_fisher_kronecker,
    fisher_kronecker,
    gauss_newton_kronecker,
)
from curvax.stages.estimation.matvecs import (
    empirical_fisher_matvec,
    exact_diag,
    fisher_matvec,
    gauss_newton_matvec,
    hessian_matvec,
)
from curvax.stages.estimation.output_noise import fisher_diag, gauss_newton_diag
from curvax.stages.estimation.per_example import empirical_fisher_diag, squared_gradient

__all__ = [
    "empirical_fisher_diag",
    "empirical_fisher_kronecker",
    "empirical_fisher_matvec",
    "exact_diag",
    "fisher_diag",
    "fisher_eigenvalues",
    "fisher_kronecker",
    "fisher_matvec",
    "gauss_newton_diag",
    "gauss_newton_kronecker",
    "gauss_newton_matvec",
    "gradient_kronecker",
    "hessian_matvec",
    "hutchinson_diag",
    "squared_gradient",
]
