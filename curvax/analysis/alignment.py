"""Gradients, updates and parameters ↦ the angles between them, and the norms of their blocks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.analysis.ascent import ascend, check_ball
from curvax.analysis.blocks import Blocks, block_masks
from curvax.analysis.directions import stack_of
from curvax.analysis.evaluation import Loss, as_loss, evaluate_gradients
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Scalar, TreePrefix
from curvax.devices.axes import AxisNames
from curvax.linalg import bases
from curvax.objective import Objective


class GradientAngle(NamedTuple):
    """Result of `gradient_angle`: the turn of the gradient from θ to the perturbed point."""

    angle: jax.Array
    """The angle between ∇L(θ) and ∇L(θ + ε̂) in radians, scalar; π/2 if one of them is 0."""
    cosine: jax.Array
    """The cosine of that angle, scalar; 0 if one of them is 0."""
    norm: jax.Array
    """‖∇L(θ)‖₂, scalar."""
    perturbed_norm: jax.Array
    """‖∇L(θ + ε̂)‖₂, scalar."""


class Alignment(NamedTuple):
    """Result of `alignment`: the share of a vector in a subspace."""

    share: jax.Array
    """‖Vᵀu‖²/‖u‖², scalar; 0 for u = 0."""
    cosines: jax.Array
    """<vᵢ, u>/‖u‖ for each vector of the basis, [k]."""


def gradient_angle(
    objective: Loss,
    params: Tree,
    rho: Scalar | TreePrefix,
    *,
    mean_over: AxisNames = None,
    **ball: Any,
) -> GradientAngle:
    """Computes the angle between the gradient and the gradient at the perturbed point.

        ∠(∇L(θ), ∇L(θ + ε̂)),   ε̂ the perturbation of `sharpness`

    GSAM decomposes the gradient along the perturbed one: the larger the angle, the larger the
    orthogonal part that lowers the surrogate gap. Zhuang et al., GSAM, arXiv:2203.08065, section 4.

    Args:
        objective: an `Objective`, a `DatasetLoss`, or a callable `params -> scalar`.
        params: the point θ.
        rho: as in `sharpness`.
        mean_over: device axes over which L is the mean; `()` for the loss of each device.
        **ball: the options `p`, `steps`, `step_size`, `projected`, `ascent` and `mask` of
            `sharpness`.

    Returns:
        A `GradientAngle`.

    Raises:
        ValueError, TypeError: an option out of range.

    Examples:
        >>> import jax.numpy as jnp
        >>> from curvax import analysis
        >>> loss = lambda w: 0.5 * w[0] ** 2 + 2.0 * w[1] ** 2
        >>> found = analysis.gradient_angle(loss, jnp.array([4.0, 1.0]), rho=0.5)
        >>> round(float(found.angle), 3), round(float(found.cosine), 3)
        (0.108, 0.994)
    """
    objective = as_loss(objective, "gradient_angle", params)
    check_ball("gradient_angle", params, rho, **ball)
    step_size = ball.pop("step_size", None)
    return evaluate_gradients(
        _gradient_angle, objective, params, rho, step_size, mean_over=mean_over, **ball
    )


def alignment(vector: Tree, basis: Tree) -> Alignment:
    """Computes the share of a gradient or an update in the span of orthonormal directions.

        ‖Vᵀu‖² / ‖u‖²

    In the top eigenspace of the Hessian, `top_eigenpairs(objective, params, k).vectors`, lies most
    of the gradient of a classifier with k classes. Gur-Ari, Roberts & Dyer, arXiv:1812.04754.

    Args:
        vector: u, a tree like the parameters.
        basis: V, orthonormal trees like u, stacked along a new first axis [k, ...] or in a list.

    Returns:
        An `Alignment`.

    Raises:
        ValueError: the basis is not shaped like the vector.
        TypeError: the vector is complex.

    Examples:
        >>> import jax.numpy as jnp
        >>> from curvax import analysis
        >>> found = analysis.alignment(jnp.array([3.0, 4.0]), [jnp.array([1.0, 0.0])])
        >>> round(float(found.share), 2), round(float(found.cosines[0]), 2)
        (0.36, 0.6)
    """
    checks.refuse_complex(vector, "alignment")
    stack, _ = stack_of(basis, vector, "alignment")
    length = trees.norm(vector)
    cosines = trees.ratio(bases.coefficients(stack, vector), length)
    return Alignment(jnp.sum(cosines**2), cosines)


def block_norms(tree: Tree, blocks: Blocks = "*") -> dict[str, jax.Array]:
    """Computes the 2-norm of each block of a tree of weights, of a gradient or of an update.

    Chen, Hsieh & Gong, arXiv:2106.01548, Table 3: SAM makes the weights larger.

    Args:
        tree: a tree of arrays like the parameters.
        blocks: a layout `curvax.layout(model, variables)`, patterns over paths, or
            `{name: patterns}`, as in `block_eigenvalues`.

    Returns:
        `{block: scalar}`.

    Raises:
        ValueError: a pattern without a match, or the layout of another model.
        TypeError: the tree is complex.

    Examples:
        >>> import jax.numpy as jnp
        >>> from curvax import analysis
        >>> norms = analysis.block_norms({"a": jnp.array([3.0, 4.0]), "b": jnp.ones(4)})
        >>> {name: round(float(x), 3) for name, x in norms.items()}
        {'a': 5.0, 'b': 2.0}
    """
    checks.refuse_complex(tree, "block_norms")
    masked = lambda mask: jax.tree.map(lambda m, x: m * trees.widen(x), mask, tree)
    return {name: trees.norm(masked(mask)) for name, mask in block_masks(tree, blocks).items()}


def _gradient_angle(
    objective: Objective,
    params: Tree,
    rho: Scalar | TreePrefix,
    step_size: Scalar | None,
    *,
    mean_over: AxisNames,
    **ball: Any,
) -> GradientAngle:
    local = objective.local_axes(params)
    over = checks.averaged_axes(mean_over, local, stage="gradient_angle")
    found = ascend(objective, params, rho, over, step_size=step_size, **ball)
    g, g_p = found.gradient, found.last_gradient
    norm, norm_p = trees.norm(g), trees.norm(g_p)
    # arccos loses half the digits near 1; 2 arctan(‖u - v‖/‖u + v‖) of the unit vectors does not.
    apart = lambda sign: trees.norm(trees.add_scaled(trees.unit(g), sign, trees.unit(g_p)))
    angle = 2 * jnp.arctan2(apart(-1.0), apart(1.0))
    vanishes = (norm == 0) | (norm_p == 0)
    angle = jnp.where(vanishes, jnp.pi / 2, angle)
    return GradientAngle(angle, trees.cosine(g, g_p), norm, norm_p)
