"""Stages: estimate, smooth, precondition, solve, perturb, project, average, restrict."""

from curvax.stages.complex_parameters import split_real_and_imaginary
from curvax.stages.eigenbasis import in_eigenbasis
from curvax.stages.estimation import (
    empirical_fisher_diag,
    empirical_fisher_kronecker,
    empirical_fisher_matvec,
    exact_diag,
    fisher_diag,
    fisher_eigenvalues,
    fisher_kronecker,
    fisher_matvec,
    gauss_newton_diag,
    gauss_newton_kronecker,
    gauss_newton_matvec,
    gradient_kronecker,
    hessian_matvec,
    hutchinson_diag,
    squared_gradient,
)
from curvax.stages.levenberg_marquardt import levenberg_marquardt
from curvax.stages.local_entropy import local_entropy
from curvax.stages.per_group import per_group
from curvax.stages.perturbation import sam_perturb
from curvax.stages.pmean_updates import pmean_updates
from curvax.stages.preconditioning import clip_by_diagonal, scale_by_power
from curvax.stages.projection import gsam_project, keep_orthogonal, penalize_gap
from curvax.stages.restriction import partition, restrict
from curvax.stages.smoothing import accumulate, ema_mean, ema_rms, every, spatial_average
from curvax.stages.solving import damp, quadratic_step, solve, trust_region
from curvax.stages.trajectory import trajectory_loss

__all__ = [
    "accumulate",
    "clip_by_diagonal",
    "damp",
    "ema_mean",
    "ema_rms",
    "empirical_fisher_diag",
    "empirical_fisher_kronecker",
    "empirical_fisher_matvec",
    "every",
    "exact_diag",
    "fisher_diag",
    "fisher_eigenvalues",
    "fisher_kronecker",
    "fisher_matvec",
    "gauss_newton_diag",
    "gauss_newton_kronecker",
    "gauss_newton_matvec",
    "gradient_kronecker",
    "gsam_project",
    "hessian_matvec",
    "hutchinson_diag",
    "in_eigenbasis",
    "keep_orthogonal",
    "levenberg_marquardt",
    "local_entropy",
    "partition",
    "penalize_gap",
    "per_group",
    "pmean_updates",
    "quadratic_step",
    "restrict",
    "sam_perturb",
    "scale_by_power",
    "solve",
    "spatial_average",
    "split_real_and_imaginary",
    "squared_gradient",
    "trajectory_loss",
    "trust_region",
]
