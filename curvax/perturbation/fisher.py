"""SAM's ascent in the space of distributions: the metric is the Fisher matrix."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.safe_math import root
from curvax.arithmetic.trees import Tree
from curvax.curvature import fvp
from curvax.curvature.differentiability import check_mode
from curvax.devices import axes
from curvax.linalg import Solver, cg
from curvax.linalg.solvers import check_solver
from curvax.objective import Objective
from curvax.perturbation.directions import MetricAscent

TEN_STEPS = cg(10)


def fisher_ascent(
    damping: Any = 1e-3, *, solver: Solver = TEN_STEPS, mode: str = "auto"
) -> MetricAscent:
    """Steepest ascent where distance is measured between predictions, for `sam_perturb(ascent=)`.

        ε̂ = argmax <g, ε> over εᵀ(F + λI)ε <= ρ²  =  ρ (F + λI)⁻¹g / ‖(F + λI)⁻¹g‖_{F + λI}

    The predictions at θ + ε̂ differ from those at θ by KL ≈ ½ ρ² at most. It needs an `Objective`
    with `model=` and a likelihood. Martens, arXiv:1412.1193, section 6, on the metric.

    Args:
        damping: λ >= 0, a number or a traced one.
        solver: `cg(10)`, `dense()`, `row_space()`.
        mode: of the Fisher product, as in `ggnvp`.

    Raises:
        TypeError, ValueError: `solver` is none; λ < 0; an unknown mode.
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
        own = objective._device_part()
        fisher = fvp(own, params, mode=mode).averaged(over, own.batch_weight())
        product = fisher.within(masked, masked).damped(damping)
        x = solver(product, g).x
        x = trees.scale(trees.inverse(trees.magnitude(x)), x)
        return trees.divided(x, root(jnp.maximum(trees.dot(x, product(x)), 0)))

    return MetricAscent(direction)
