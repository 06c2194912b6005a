"""The geometry of a loss: an objective and a point ↦ spectra, kernels, sharpness, landscapes.

The loss is an `Objective`, a `DatasetLoss` over the batches of a loader, or a callable
`params -> scalar`. This package needs JAX and Optax only; `curvax.plotting` draws its results.
"""

from typing import Any

from curvax import checks
from curvax.analysis.activations.measures import activation_norms, active_fraction, attention_maps
from curvax.analysis.alignment import (
    Alignment,
    GradientAngle,
    alignment,
    block_norms,
    gradient_angle,
)
from curvax.analysis.block_spectra import BlockEigenvalue, block_eigenvalues
from curvax.analysis.blocks import block_masks
from curvax.analysis.dataset_loss import DatasetLoss
from curvax.analysis.directions import (
    Trajectory,
    of_block,
    random_directions,
    trajectory_directions,
)
from curvax.analysis.distances import FisherKL, fisher_kl
from curvax.analysis.filters import filter_normalised
from curvax.analysis.landscapes import Landscape, landscape
from curvax.analysis.mlp_hessians import MlpBlockHessian, mlp_block_hessians
from curvax.analysis.ntk import ConditionNumber, ntk, ntk_condition_number
from curvax.analysis.random_sharpness import RandomSharpness, random_sharpness
from curvax.analysis.spectra import Spectrum, curvature_trace, hessian_spectrum, top_eigenpairs
from curvax.analysis.worst_case_sharpness import (
    MSharpness,
    Sharpness,
    SurrogateGap,
    m_sharpness,
    sharpness,
    surrogate_gap,
)

__all__ = [
    "Alignment",
    "BlockEigenvalue",
    "ConditionNumber",
    "DatasetLoss",
    "FisherKL",
    "GradientAngle",
    "Landscape",
    "MSharpness",
    "MlpBlockHessian",
    "RandomSharpness",
    "Sharpness",
    "Spectrum",
    "SurrogateGap",
    "Trajectory",
    "activation_norms",
    "active_fraction",
    "alignment",
    "attention_maps",
    "block_eigenvalues",
    "block_masks",
    "block_norms",
    "curvature_trace",
    "filter_normalised",
    "fisher_kl",
    "gradient_angle",
    "hessian_spectrum",
    "landscape",
    "m_sharpness",
    "mlp_block_hessians",
    "ntk",
    "ntk_condition_number",
    "of_block",
    "random_directions",
    "random_sharpness",
    "sharpness",
    "surrogate_gap",
    "top_eigenpairs",
    "trajectory_directions",
]


def __getattr__(name: str) -> Any:
    if name == "Sweep":
        checks.warn_renamed(f"{__name__}.{name}", f"{__name__}.DatasetLoss")
        return DatasetLoss
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
