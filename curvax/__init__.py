"""curvax: curvature and sharpness as composable Optax stages.

    adahessian = hutchinson_diag() | spatial_average() | ema_rms(0.999) | optax.ema(0.9) | ...
    gsam = sam_perturb(rho) | gsam_project(alpha) | optax.adamw(3e-3)

Each idea is a stage, each method a pipe, each pipe an `optax.GradientTransformationExtraArgs`.
The loss comes in through Optax's own `value_fn`.
"""

import importlib.util
from typing import Any

from curvax.curvature import empirical_fvp, fvp, ggnvp, hvp
from curvax.likelihoods import bernoulli, categorical, gaussian, poisson
from curvax.linalg import (
    Reason,
    Solution,
    Solver,
    cg,
    dense,
    estimate_diagonal,
    estimate_trace,
    gaussian_probe,
    lanczos,
    materialize,
    power_iteration,
    rademacher,
    row_space,
    spectral_density,
    steihaug,
)
from curvax.linear_operator import Product
from curvax.methods import (
    adahessian,
    diagonal_natural_gradient,
    gauss_newton,
    gsam,
    hessian_free,
    look_sam,
    natural_gradient,
    newton_cg,
    sam,
    sophia_g,
    sophia_h,
)
from curvax.objective import Objective
from curvax.perturbation import (
    asam,
    asam_all,
    dual_norm,
    fisher_ascent,
    random_direction,
    weight_scaled,
)
from curvax.pipes.diagnostics import diagnostics, record
from curvax.pipes.signal import Signal, Stage, pipe, stage
from curvax.schedules import rho_like
from curvax.stages import (
    accumulate,
    clip_by_diagonal,
    damp,
    ema_mean,
    ema_rms,
    empirical_fisher_diag,
    empirical_fisher_matvec,
    every,
    exact_diag,
    fisher_diag,
    fisher_matvec,
    gauss_newton_diag,
    gauss_newton_matvec,
    gsam_project,
    hessian_matvec,
    hutchinson_diag,
    keep_orthogonal,
    levenberg_marquardt,
    partition,
    penalize_gap,
    per_group,
    pmean_updates,
    quadratic_step,
    restrict,
    sam_perturb,
    scale_by_power,
    solve,
    spatial_average,
    split_real_and_imaginary,
    squared_gradient,
    trust_region,
)

__all__ = [
    "Objective",
    "Product",
    "Reason",
    "Signal",
    "Solution",
    "Solver",
    "Stage",
    "accumulate",
    "adahessian",
    "asam",
    "asam_all",
    "bernoulli",
    "categorical",
    "cg",
    "clip_by_diagonal",
    "damp",
    "dense",
    "diagnostics",
    "diagonal_natural_gradient",
    "dual_norm",
    "ema_mean",
    "ema_rms",
    "empirical_fisher_diag",
    "empirical_fisher_matvec",
    "empirical_fvp",
    "estimate_diagonal",
    "estimate_trace",
    "every",
    "exact_diag",
    "fisher_ascent",
    "fisher_diag",
    "fisher_matvec",
    "fvp",
    "gauss_newton",
    "gauss_newton_diag",
    "gauss_newton_matvec",
    "gaussian",
    "gaussian_probe",
    "ggnvp",
    "gsam",
    "gsam_project",
    "hessian_free",
    "hessian_matvec",
    "hutchinson_diag",
    "hvp",
    "keep_orthogonal",
    "lanczos",
    "levenberg_marquardt",
    "look_sam",
    "materialize",
    "natural_gradient",
    "newton_cg",
    "partition",
    "penalize_gap",
    "per_group",
    "pipe",
    "pmean_updates",
    "poisson",
    "power_iteration",
    "quadratic_step",
    "rademacher",
    "random_direction",
    "record",
    "restrict",
    "rho_like",
    "row_space",
    "sam",
    "sam_perturb",
    "scale_by_power",
    "solve",
    "sophia_g",
    "sophia_h",
    "spatial_average",
    "spectral_density",
    "split_real_and_imaginary",
    "squared_gradient",
    "stage",
    "steihaug",
    "trust_region",
    "weight_scaled",
]
__version__ = "0.1.0"

_PACKAGES = ("analysis", "plotting")
_FLAX = ("TrainState", "layout", "nnx_loss")


def __getattr__(name: str) -> Any:
    """What few scripts need, imported when first asked for: the names of the Flax bridge, since the
    core does without Flax, those of `curvax.analysis`, and `curvax.plotting`, since it does without
    matplotlib."""
    if name == "layout" and importlib.util.find_spec("flax") is None:
        return importlib.import_module("curvax.parameter_roles.layouts").layout_of_tree
    if name in _FLAX:
        return getattr(importlib.import_module("curvax.flax_bridge"), name)
    if name in _PACKAGES:
        return importlib.import_module(f"curvax.{name}")
    analysis = importlib.import_module("curvax.analysis")
    if name not in analysis.__all__:
        raise AttributeError(f"module 'curvax' has no attribute {name!r}")
    return getattr(analysis, name)
