"""curvax: curvature and sharpness as composable Optax stages.

    adahessian = hutchinson_diag() | spatial_average() | ema_rms(0.999) | optax.ema(0.9) | ...
    gsam = sam_perturb(rho) | gsam_project(alpha) | optax.adamw(3e-3)

A stage implements one idea, a method is a pipe of stages, and every stage, method and pipe is an
`optax.GradientTransformationExtraArgs`. The loss is passed to `update` as `value_fn`:

    objective = curvax.Objective(loss, batch)
    value, grads = objective.value_and_grad(params)
    updates, state = tx.update(grads, state, params, value_fn=objective)

Examples:
    >>> import jax.numpy as jnp, optax, curvax
    >>> loss = lambda w, batch: 0.5 * jnp.mean((batch - w) ** 2)
    >>> objective = curvax.Objective(loss, jnp.array([1.0, 3.0]))
    >>> tx, w = curvax.sam(optax.sgd(1.0), rho=0.1), jnp.array(0.0)
    >>> value, grads = objective.value_and_grad(w)
    >>> updates, state = tx.update(grads, tx.init(w), w, value_fn=objective)
    >>> round(float(updates), 3)  # the gradient at w - 0.1 is -2.1
    2.1
"""

import importlib.util
from typing import TYPE_CHECKING, Any

from curvax import checks
from curvax.adversarial_examples import Attack, adversarial, pgd
from curvax.contrastive import supervised_contrastive
from curvax.curvature import (
    CorrectedFactors,
    KroneckerFactors,
    LeafReport,
    empirical_fvp,
    fvp,
    ggnvp,
    hvp,
    kronecker_factors,
)
from curvax.likelihoods import bernoulli, categorical, gaussian, poisson
from curvax.linalg import (
    Solution,
    Solver,
    StopReason,
    cg,
    dense,
    estimate_diagonal,
    estimate_trace,
    gaussian_probe,
    kronecker,
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
    ekfac,
    entropy_sgd,
    gauss_newton,
    gsam,
    hessian_free,
    kfac,
    look_sam,
    natural_gradient,
    newton_cg,
    sam,
    shampoo,
    soap,
    sophia_g,
    sophia_h,
)
from curvax.objective import Objective
from curvax.perturbation import (
    asam,
    asam_all,
    auto_rho,
    by_path,
    dual_norm,
    fisher_ascent,
    momentum,
    random_direction,
    weight_scaled,
)
from curvax.pipes.diagnostics import diagnostics, record
from curvax.pipes.signal import Signal, Stage, pipe, stage
from curvax.schedules import rho_schedule
from curvax.stages import (
    accumulate,
    clip_by_diagonal,
    damp,
    ema_mean,
    ema_rms,
    empirical_fisher_diag,
    empirical_fisher_kronecker,
    empirical_fisher_matvec,
    every,
    exact_diag,
    fisher_diag,
    fisher_eigenvalues,
    fisher_kronecker,
    fisher_matvec,
    gauss_newton_diag,
    gauss_newton_kronecker,
    gauss_newton_matvec,
    gradient_kronecker,
    gsam_project,
    hessian_matvec,
    hutchinson_diag,
    in_eigenbasis,
    keep_orthogonal,
    levenberg_marquardt,
    local_entropy,
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
    trajectory_loss,
    trust_region,
)

__all__ = [
    "Attack",
    "CorrectedFactors",
    "KroneckerFactors",
    "LeafReport",
    "Objective",
    "Product",
    "Signal",
    "Solution",
    "Solver",
    "Stage",
    "StopReason",
    "accumulate",
    "adahessian",
    "adversarial",
    "asam",
    "asam_all",
    "auto_rho",
    "bernoulli",
    "by_path",
    "categorical",
    "cg",
    "clip_by_diagonal",
    "damp",
    "dense",
    "diagnostics",
    "diagonal_natural_gradient",
    "dual_norm",
    "ekfac",
    "ema_mean",
    "ema_rms",
    "empirical_fisher_diag",
    "empirical_fisher_kronecker",
    "empirical_fisher_matvec",
    "empirical_fvp",
    "entropy_sgd",
    "estimate_diagonal",
    "estimate_trace",
    "every",
    "exact_diag",
    "fisher_ascent",
    "fisher_diag",
    "fisher_eigenvalues",
    "fisher_kronecker",
    "fisher_matvec",
    "fvp",
    "gauss_newton",
    "gauss_newton_diag",
    "gauss_newton_kronecker",
    "gauss_newton_matvec",
    "gaussian",
    "gaussian_probe",
    "ggnvp",
    "gradient_kronecker",
    "gsam",
    "gsam_project",
    "hessian_free",
    "hessian_matvec",
    "hutchinson_diag",
    "hvp",
    "in_eigenbasis",
    "keep_orthogonal",
    "kfac",
    "kronecker",
    "kronecker_factors",
    "lanczos",
    "levenberg_marquardt",
    "local_entropy",
    "look_sam",
    "materialize",
    "momentum",
    "natural_gradient",
    "newton_cg",
    "partition",
    "penalize_gap",
    "per_group",
    "pgd",
    "pipe",
    "pmean_updates",
    "poisson",
    "power_iteration",
    "quadratic_step",
    "rademacher",
    "random_direction",
    "record",
    "restrict",
    "rho_schedule",
    "row_space",
    "sam",
    "sam_perturb",
    "scale_by_power",
    "shampoo",
    "soap",
    "solve",
    "sophia_g",
    "sophia_h",
    "spatial_average",
    "spectral_density",
    "split_real_and_imaginary",
    "squared_gradient",
    "stage",
    "steihaug",
    "supervised_contrastive",
    "trajectory_loss",
    "trust_region",
    "weight_scaled",
]
__version__ = "0.1.0"

RENAMED = {"Reason": "StopReason", "Sweep": "DatasetLoss", "rho_like": "rho_schedule"}
"""Old name ↦ new name: accepted with a DeprecationWarning until the next release but one."""

_PACKAGES = ("analysis", "plotting")
_LAZY = {
    "curvax.analysis": (
        "Alignment", "BlockEigenvalue", "ConditionNumber", "DatasetLoss", "FisherKL",
        "GradientAngle", "Landscape", "MSharpness", "MlpBlockHessian", "RandomSharpness",
        "Sharpness", "Spectrum", "SurrogateGap", "Trajectory", "activation_norms",
        "active_fraction", "alignment", "attention_maps", "block_eigenvalues", "block_masks",
        "block_norms", "curvature_trace", "filter_normalised", "fisher_kl", "gradient_angle",
        "hessian_spectrum", "landscape", "m_sharpness", "mlp_block_hessians", "ntk",
        "ntk_condition_number", "of_block", "random_directions", "random_sharpness", "sharpness",
        "surrogate_gap", "top_eigenpairs", "trajectory_directions",
    ),
    "curvax.flax_bridge": ("TrainState", "layout", "nnx_loss"),
}  # fmt: skip
"""Names that are imported at first use, by the module that defines them."""
_HOME = {name: module for module, names in _LAZY.items() for name in names}

if TYPE_CHECKING:
    from curvax import analysis, plotting  # noqa: F401
    from curvax.analysis import *  # noqa: F403
    from curvax.flax_bridge import TrainState, layout, nnx_loss  # noqa: F401


def __getattr__(name: str) -> Any:
    """Imports at first use what would make `import curvax` slow or need optional packages.

    These are the Flax bridge (Flax), `curvax.plotting` (matplotlib) and the names of
    `curvax.analysis`. Deprecated names are resolved here too.
    """
    if name in RENAMED:
        new = RENAMED[name]
        checks.warn_renamed(f"curvax.{name}", f"curvax.{new}")
        return globals()[new] if new in globals() else __getattr__(new)
    if name == "layout" and importlib.util.find_spec("flax") is None:
        return importlib.import_module("curvax.parameter_roles.layouts").layout_of_tree
    if name in _PACKAGES:
        return importlib.import_module(f"curvax.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PACKAGES, *_HOME})
