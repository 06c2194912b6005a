"""Kronecker factors of the updates, as in Shampoo: a stage that needs no model."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.curvature.kronecker.gradient import (
    GradientFactors,
    gradient_factors,
    structure_of_layout,
)
from curvax.hyperparameters import injectable
from curvax.parameter_roles.layouts import Layout
from curvax.pipes.initial import telling
from curvax.pipes.signal import Signal, Stage, stage


@injectable
def gradient_kronecker(layout: Layout | None = None, *, largest: int = 8192) -> Stage:
    """Adds the Kronecker factors of the updates, A = VᵀV over inputs and G = VVᵀ over outputs.

        C = (G ⊗ A)^½

    for every kernel V [outputs, inputs], and the square of every other parameter. A kernel of
    several axes is a matrix of all its inputs and all its outputs, and of stacked layers each has
    factors of its own. `accumulate() | scale_by_power(0.5)` behind it is Shampoo, G^-¼ V A^-¼;
    `ema_mean` in place of the sum is its usual form. It needs no model and no `value_fn`. Gupta et
    al., arXiv:1802.09568, Algorithm 1.

    Args:
        layout: the axes of inputs, outputs and layers of each parameter, from `curvax.layout`; None
            takes them from names and shapes.
        largest: size of the largest factor. A kernel with more inputs or outputs gets its square.

    Returns:
        A stage that sets `factors`, in float32 or wider.

    Raises:
        ValueError: `largest` is not a positive int; in `update`, the updates are local to a device
            axis.

    Examples:
        >>> import jax.numpy as jnp, optax, curvax
        >>> shampoo = curvax.gradient_kronecker() | curvax.accumulate() | curvax.scale_by_power(0.5)
        >>> g = {"kernel": jnp.array([[3.0, 0.0], [0.0, -4.0]])}
        >>> updates, state = shampoo.update(g, shampoo.init(g), g)
        >>> updates["kernel"].round(3).tolist()  # the polar factor of one gradient
        [[1.0, 0.0], [0.0, -1.0]]
    """
    checks.check_count("gradient_kronecker", largest=largest)

    def init(params: Tree) -> optax.EmptyState:
        trees.require_floating(params, "gradient_kronecker")
        return optax.EmptyState()

    def zeros(params: Tree, factors: Any) -> GradientFactors:
        del factors
        structure = structure_of_layout(params, layout, largest)
        shapes = jax.eval_shape(lambda g: gradient_factors(g, structure), params)
        return jax.tree.map(jnp.zeros_like, shapes)

    def rule(
        signal: Signal, state: optax.OptState, params: Tree = None, **extra: Any
    ) -> tuple[Signal, optax.OptState]:
        del params, extra
        checks.refuse_local(signal.local, stage="gradient_kronecker")
        structure = structure_of_layout(signal.updates, layout, largest)
        return signal._replace(factors=gradient_factors(signal.updates, structure)), state

    return stage(telling(init, factors=zeros), rule)
