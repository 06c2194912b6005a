"""Flax and curvax: a linen train state, losses of nnx modules, and layouts of Flax models.

This package needs Flax (the extra `flax`).
"""

from curvax.flax_bridge.layouts import layout
from curvax.flax_bridge.losses import nnx_loss
from curvax.flax_bridge.nnx_scopes import named_modules
from curvax.flax_bridge.train_state import TrainState
from curvax.parameter_roles.layouts import Layout, Leaf, Member
from curvax.parameter_roles.matrix_axes import matrix_axes

__all__ = [
    "Layout",
    "Leaf",
    "Member",
    "TrainState",
    "layout",
    "matrix_axes",
    "named_modules",
    "nnx_loss",
]
