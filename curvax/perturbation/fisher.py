"""SAM's ascent in the Fisher metric, which measures the change of the predictions."""

from collections.abc import Callable

import jax.numpy as jnp

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.safe_math import root
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Scalar
from curvax.curvature import fvp
from curvax.curvature.differentiability import check_mode
from curvax.devices import axes
from curvax.linalg import Solver, cg
from curvax.linalg.solvers import check_solver
from curvax.objective import Objective, pieces
from curvax.perturbation.ascent_rules import MetricAscent

TEN_STEPS = cg(10)


def fisher_ascent(
    damping: Scalar = 1e-3, *, solver: Solver = TEN_STEPS, mode: str = "auto"
) -> MetricAscent:
    """Steepest ascent in the damped Fisher metric.

        ε̂ = argmax <g, ε> over εᵀ(F + λI)ε <= ρ²  =  ρ (F + λI)⁻¹g / ‖(F + λI)⁻¹g‖_{F + λI}

    The predictions at θ + ε̂ and θ differ by KL ≈ ½ ρ² at most. Martens, arXiv:1412.1193, section
    6, for the metric. `sam_perturb` then needs an `Objective` with `model=` and a likelihood,
    `steps=1`, and `second_order=False`.

    Args:
        damping: λ >= 0, in the units of the curvature: a number, traced or not.
        solver: linear solver, such as `cg(10)`, `dense()` or `row_space()`.
        mode: differentiation mode of the Fisher product, as in `fvp`.

    Returns:
        An ascent rule for `sam_perturb(ascent=)`.

    Raises:
        TypeError: `solver` is not a solver.
        ValueError: λ < 0, or an unknown mode.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> batch = {"x": jnp.array([[2.0]]), "y": jnp.array([[2.0]])}
        >>> objective = curvax.Objective(curvax.gaussian("y"), batch, model=lambda w, b: b["x"] * w)
        >>> tx, w = curvax.sam_perturb(0.5, ascent=curvax.fisher_ascent(1e-6)), jnp.zeros(1)
        >>> _, grads = objective.value_and_grad(w)
        >>> updates, state = tx.update(grads, tx.init(w), w, value_fn=objective)
        >>> round(float(updates[0] - grads[0]), 2)  # F ε̂, where F = x² = 4 and ε̂ = -ρ / √F
        -1.0
    """
    check_mode(mode)
    checks.check_range("damping", damping, 0, jnp.inf, stage="fisher_ascent")
    check_solver(solver, "fisher_ascent")

    def direction(
        objective: Objective,
        params: Tree,
        g: Tree,
        masked: Callable[[Tree], Tree],
        sync: tuple[str, ...],
    ) -> Tree:
        over = (*axes.outside(objective.joined, sync), *sync)
        own = pieces.device_part(objective)
        fisher = fvp(own, params, mode=mode).averaged(over, own.batch_weight())
        product = fisher.within(masked, masked).damped(damping)
        x = solver(product, g).x
        x = trees.scale(trees.inverse(trees.magnitude(x)), x)
        return trees.divided(x, root(jnp.maximum(trees.dot(x, product(x)), 0)))

    return MetricAscent(direction)
