"""The geometry of a loss: an objective and a point ↦ spectra, kernels, sharpness, landscapes.

This package needs JAX and Optax only; pictures of what it returns are made elsewhere.
"""

from curvax.analysis.block_spectra import BlockEigenvalue, block_eigenvalues
from curvax.analysis.blocks import block_masks
from curvax.analysis.spectra import Spectrum, curvature_trace, hessian_spectrum, top_eigenpairs
from curvax.analysis.sweeps import Sweep

__all__ = [
    "BlockEigenvalue",
    "Spectrum",
    "Sweep",
    "block_eigenvalues",
    "block_masks",
    "curvature_trace",
    "hessian_spectrum",
    "top_eigenpairs",
]
