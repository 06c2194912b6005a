"""Where gradients and updates point, and how long the parts of a tree are."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.analysis.ascent import ascend, check_ball
from curvax.analysis.blocks import Blocks, block_masks
from curvax.analysis.directions import stack_of
from curvax.analysis.evaluation.whole_sets import Loss, as_loss, walked
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.devices.axes import AxisNames
from curvax.linalg import bases
from curvax.objective import Objective


class GradientAngle(NamedTuple):
    """How far the gradient turns on the way to the worst point nearby."""

    angle: jax.Array
    """Between ∇L(θ) and ∇L(θ + ε̂), in radians, scalar; π/2 where one of them vanishes."""
    cosine: jax.Array
    """Its cosine, scalar; 0 where one of them vanishes."""
    norm: jax.Array
    """‖∇L(θ)‖₂, scalar."""
    perturbed_norm: jax.Array
    """‖∇L(θ + ε̂)‖₂, scalar."""


class Alignment(NamedTuple):
    """How much of a vector lies in a subspace."""

    share: jax.Array
    """‖Vᵀu‖²/‖u‖², scalar; 0 for u = 0."""
    cosines: jax.Array
    """<vᵢ, u>/‖u‖ for each vector of the basis, [k]."""


def gradient_angle(
    objective: Loss,
    params: Tree,
    rho: Any,
    *,
    mean_over: AxisNames = None,
    **ball: Any,
) -> GradientAngle:
    """The angle between the gradient and the gradient at the worst point of a ρ-ball.

    What GSAM decomposes: the larger the angle, the more of the gradient is left to lower the
    surrogate gap. Zhuang et al., GSAM, arXiv:2203.08065, section 4.

    Args:
        objective: an `Objective`, a `Sweep` over a loader, or a callable `params -> scalar`.
        params: the point θ.
        rho: as in `sharpness`.
        mean_over: the device axes over which L is the mean; `()` for each device's own.
        **ball: the options of `sharpness`.

    Returns:
        A `GradientAngle`.

    Raises:
        ValueError, TypeError: an option out of range.
    """
    objective = as_loss(objective, "gradient_angle", params)
    check_ball("gradient_angle", params, rho, **ball)
    step_size = ball.pop("step_size", None)
    return walked(_gradient_angle, objective, params, rho, step_size, mean_over=mean_over, **ball)


def alignment(vector: Tree, basis: Any) -> Alignment:
    """How much of a gradient or an update lies in the span of orthonormal directions.

    In the top eigenspace of the Hessian, `top_eigenpairs(objective, params, k).vectors`, lies most
    of the gradient of a classifier with k classes. Gur-Ari, Roberts & Dyer, arXiv:1812.04754.

    Args:
        vector: u, a tree like the parameters.
        basis: V, such trees stacked along a new first axis [k, ...], or in a list.

    Returns:
        An `Alignment`.

    Raises:
        ValueError: the basis is not shaped like the vector.
        TypeError: the vector is complex.
    """
    checks.refuse_complex(vector, "alignment")
    stack, _ = stack_of(basis, vector, "alignment")
    length = trees.norm(vector)
    cosines = trees.ratio(bases.coefficients(stack, vector), length)
    return Alignment(jnp.sum(cosines**2), cosines)


def block_norms(tree: Tree, blocks: Blocks = "*") -> dict[str, jax.Array]:
    """The 2-norm of each block of a tree: of weights, a gradient, an update.

    Chen, Hsieh & Gong, arXiv:2106.01548, Table 3: SAM makes the weights larger.

    Args:
        tree: shaped like the parameters.
        blocks: `curvax.layout(model, variables)`, patterns over paths, or `{name: patterns}`, as in
            `block_eigenvalues`.

    Returns:
        `{block: scalar}`.

    Raises:
        ValueError: a pattern matches nothing, or the layout is that of another model.
        TypeError: the tree is complex.
    """
    checks.refuse_complex(tree, "block_norms")
    masked = lambda mask: jax.tree.map(lambda m, x: m * trees.widen(x), mask, tree)
    return {name: trees.norm(masked(mask)) for name, mask in block_masks(tree, blocks).items()}


def _gradient_angle(
    objective: Objective,
    params: Tree,
    rho: Any,
    step_size: Any,
    *,
    mean_over: AxisNames,
    **ball: Any,
) -> GradientAngle:
    local = objective.local_axes(params)
    over = checks.averaged_axes(mean_over, local, stage="gradient_angle")
    found = ascend(objective, params, rho, over, step_size=step_size, **ball)
    g, g_p = found.gradient, found.last_gradient
    norm, norm_p = trees.norm(g), trees.norm(g_p)
    # An arc cosine near 1 loses half the digits; the chord of the two units does not.
    apart = lambda sign: trees.norm(trees.add_scaled(trees.unit(g), sign, trees.unit(g_p)))
    angle = 2 * jnp.arctan2(apart(-1.0), apart(1.0))
    vanishes = (norm == 0) | (norm_p == 0)
    angle = jnp.where(vanishes, jnp.pi / 2, angle)
    return GradientAngle(angle, trees.cosine(g, g_p), norm, norm_p)
