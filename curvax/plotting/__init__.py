"""Results of `curvax.analysis`, or `{run: result}` to compare runs ↦ matplotlib axes.

    ax = plotting.block_eigenvalues({"SGD": block_eigenvalues(...), "SAM": block_eigenvalues(...)})

A function draws the results of the function of `curvax.analysis` with the same name. All share:

    ax         axes to draw on; by default new ones of pyplot
    label      name of the run in the legend, for a single result
    returns    the axes; matplotlib's settings do not change
    raises     TypeError for other results; ValueError for none, or for a `label` of several

This package needs matplotlib, which the `plot` extra installs.
"""

from curvax.plotting.activations import (
    activation_norms,
    active_fraction,
    attention_maps,
    block_norms,
    mlp_block_hessians,
)
from curvax.plotting.directions import alignment, fisher_kl, gradient_angles
from curvax.plotting.landscapes import landscape, landscape_surface, landscapes, trajectory
from curvax.plotting.ntk import ntk, ntk_spectrum
from curvax.plotting.sharpness import (
    m_sharpness,
    random_sharpness,
    sharpness_profile,
    surrogate_gap,
)
from curvax.plotting.spectra import block_eigenvalues, eigenvalues, spectral_density

__all__ = [
    "activation_norms",
    "active_fraction",
    "alignment",
    "attention_maps",
    "block_eigenvalues",
    "block_norms",
    "eigenvalues",
    "fisher_kl",
    "gradient_angles",
    "landscape",
    "landscape_surface",
    "landscapes",
    "m_sharpness",
    "mlp_block_hessians",
    "ntk",
    "ntk_spectrum",
    "random_sharpness",
    "sharpness_profile",
    "spectral_density",
    "surrogate_gap",
    "trajectory",
]
