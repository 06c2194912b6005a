"""Pictures of what `curvax.analysis` returns: a result, or `{run: result}` ↦ matplotlib axes.

    ax = plotting.block_eigenvalues({"SGD": block_eigenvalues(...), "SAM": block_eigenvalues(...)})

Where `curvax.analysis` has a function of the same name it makes what is drawn. Each draws on `ax`
where one is given, else on new axes of pyplot, returns the axes, and leaves all settings alone.
This package needs matplotlib, which the `plot` extra brings.
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
