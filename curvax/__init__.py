"""curvax: curvature and sharpness as composable Optax stages.

    adahessian = hutchinson_diag() | spatial_average() | ema_rms(0.999) | optax.ema(0.9) | ...
    gsam = sam_perturb(rho) | gsam_project(alpha) | optax.adamw(3e-3)

Each idea is a stage, each method a pipe, each pipe an `optax.GradientTransformationExtraArgs`.
The loss comes in through Optax's own `value_fn`.
"""

import importlib
from typing import Any

from curvax.figures import diagnostics, record
from curvax.linalg import (
    asam,
    asam_all,
    dual_norm,
    estimate_diagonal,
    estimate_trace,
    gaussian_probe,
    power_iteration,
    rademacher,
    random_direction,
    weight_scaled,
)
from curvax.methods import adahessian, gsam, look_sam, sam
from curvax.objective import Objective
from curvax.oracles import hvp
from curvax.schedules import rho_like
from curvax.signal import Signal, Stage, pipe, stage
from curvax.stages import (
    ema_rms,
    every,
    gsam_project,
    hutchinson_diag,
    keep_orthogonal,
    partition,
    penalize_gap,
    per_group,
    pmean_updates,
    restrict,
    sam_perturb,
    scale_by_power,
    spatial_average,
)

__all__ = [
    "Objective",
    "Signal",
    "Stage",
    "adahessian",
    "asam",
    "asam_all",
    "diagnostics",
    "dual_norm",
    "ema_rms",
    "estimate_diagonal",
    "estimate_trace",
    "every",
    "gaussian_probe",
    "gsam",
    "gsam_project",
    "hutchinson_diag",
    "hvp",
    "keep_orthogonal",
    "look_sam",
    "partition",
    "penalize_gap",
    "per_group",
    "pipe",
    "pmean_updates",
    "power_iteration",
    "rademacher",
    "random_direction",
    "record",
    "restrict",
    "rho_like",
    "sam",
    "sam_perturb",
    "scale_by_power",
    "spatial_average",
    "stage",
    "weight_scaled",
]
__version__ = "0.1.0"

_FLAX = ("TrainState", "layout", "nnx_loss")


def __getattr__(name: str) -> Any:
    """The Flax bridge by its names, imported when first asked for: the core does without Flax."""
    if name not in _FLAX:
        raise AttributeError(f"module 'curvax' has no attribute {name!r}")
    return getattr(importlib.import_module("curvax.flax_bridge"), name)
