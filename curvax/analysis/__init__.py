"""The geometry of a loss: an objective and a point ↦ spectra, kernels, sharpness, landscapes.

This package needs JAX and Optax only; pictures of what it returns are made elsewhere.
"""
