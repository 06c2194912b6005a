"""The geometry of a loss: an objective and a point ↦ spectra, kernels, sharpness, landscapes.

This package needs JAX and Optax only; pictures of what it returns are made elsewhere.
"""

from curvax.analysis.average_case import RandomSharpness, random_sharpness
from curvax.analysis.block_spectra import BlockEigenvalue, block_eigenvalues
from curvax.analysis.blocks import block_masks
from curvax.analysis.distances import FisherKL, fisher_kl
from curvax.analysis.kernels import ConditionNumber, ntk, ntk_condition_number
from curvax.analysis.spectra import Spectrum, curvature_trace, hessian_spectrum, top_eigenpairs
from curvax.analysis.sweeps import Sweep
from curvax.analysis.worst_case import (
    MSharpness,
    Sharpness,
    SurrogateGap,
    m_sharpness,
    sharpness,
    surrogate_gap,
)

__all__ = [
    "BlockEigenvalue",
    "ConditionNumber",
    "FisherKL",
    "MSharpness",
    "RandomSharpness",
    "Sharpness",
    "Spectrum",
    "SurrogateGap",
    "Sweep",
    "block_eigenvalues",
    "block_masks",
    "curvature_trace",
    "fisher_kl",
    "hessian_spectrum",
    "m_sharpness",
    "ntk",
    "ntk_condition_number",
    "random_sharpness",
    "sharpness",
    "surrogate_gap",
    "top_eigenpairs",
]
