"""Steps from a curvature product: damping, linear solvers, trust region, quadratic model."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.safe_math import root
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Scalar, ScalarOrSchedule, ValueFn
from curvax.hyperparameters import injectable
from curvax.linalg import Solver
from curvax.linalg.solvers import check_solver
from curvax.objective import Objective, device_mean
from curvax.pipes import requirements
from curvax.pipes.diagnostics import Flags, Metrics, metrics_of, no_metrics
from curvax.pipes.signal import Signal, Stage, at, stage


class DampState(NamedTuple):
    step: jax.Array
    """t, int32 scalar."""
    measured: Flags
    figures: Metrics
    """`damping`."""


def damp(damping: ScalarOrSchedule | None = None) -> Stage:
    """Adds Tikhonov damping to the curvature product: C ← C + λI.

    Martens, arXiv:1412.1193, section 10.

    Args:
        damping: λ >= 0, in the units of the curvature: a number, traced or not, or a schedule. None
            takes λ from `levenberg_marquardt` around the pipe, or from `tx.update(..., damping=λ)`.

    Returns:
        A stage that needs `matvec` and replaces it. Its metric is `damping`.

    Raises:
        ValueError: λ < 0; in `update`, λ is given nowhere, or no earlier stage set a product.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, curvax
        >>> loss = lambda w: 0.5 * jnp.sum(w**2)  # the Hessian is I
        >>> tx = curvax.hessian_matvec() | curvax.damp(1.0) | curvax.solve(curvax.cg(10))
        >>> w = jnp.array([3.0, 5.0])
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> [round(float(x), 3) for x in updates]
        [1.5, 2.5]
    """
    checks.check_range("damping", damping, 0, jnp.inf, stage="damp")
    own = damping

    def rule(
        signal: Signal,
        state: DampState,
        params: Tree = None,
        *,
        damping: Scalar | None = None,
        **extra: Any,
    ) -> tuple[Signal, DampState]:
        del params, extra
        product = requirements.needed_matvec(
            signal.matvec, signal.factors, "damp", "damps a curvature product"
        )
        lam = at(own, state.step) if own is not None else damping
        if lam is None:
            raise ValueError(
                "`damp()` needs a λ, and received none. Write `damp(1e-3)`, pass "
                "`tx.update(..., damping=λ)`, or adapt λ: `levenberg_marquardt(... | damp() "
                "| solve(...) | optax.scale_by_learning_rate(1.0))`."
            )
        # A Python number is not made an array, so that solvers can see that λ is 0.
        signal = signal._replace(matvec=product.damped(lam))
        return signal, DampState(state.step + 1, *metrics_of({"damping": lam}))

    return stage(lambda params: DampState(jnp.zeros((), jnp.int32), *no_metrics("damping")), rule)


class SolveState(NamedTuple):
    solver: Tree
    """The state of the solver."""
    measured: Flags
    figures: Metrics


@injectable
def solve(solver: Solver) -> Stage:
    """Replaces the updates by the solution of a linear system with the curvature product.

        u ← (C + λI)⁻¹ u

    With the Fisher matrix this is the natural gradient (Martens, arXiv:1412.1193, sections 5 and
    6), with the Hessian a Newton step.

    Args:
        solver: linear solver, such as `cg(20)`, `steihaug(radius)`, `dense()` or `row_space()`. A
            diagonal preconditioner (`cg(20, preconditioner=0.75)`) uses the signal's diagonal;
            `kronecker()`, as a solver or a preconditioner, its factors.

    Returns:
        A stage that needs `matvec` or `factors`. Its metrics are `cg_reason`, the number of a
        `curvax.StopReason`, and, except with `kronecker()`, `cg_steps` and `cg_residual`
        ‖b - Ax‖/‖b‖.

    Raises:
        TypeError: `solver` is not a solver.
        ValueError: in `update`, no earlier stage set a product, or the updates are local to a
            device axis.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, curvax
        >>> loss = lambda w: 0.5 * ((w[0] - 1) ** 2 + 10 * (w[1] - 2) ** 2)
        >>> tx = curvax.hessian_matvec() | curvax.solve(curvax.cg(10)) | optax.scale(-1.0)
        >>> w = jnp.zeros(2)
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> [round(float(x), 3) for x in w + updates]
        [1.0, 2.0]
    """
    check_solver(solver, "solve")
    names = ["cg_steps", "cg_residual"] * solver.measures + ["cg_reason"]

    def init(params: Tree, factors: Any = None) -> SolveState:
        given = (params, factors) if solver.uses_factors else (params,)
        return SolveState(solver.init(*given), *no_metrics(*names))

    def rule(
        signal: Signal,
        state: SolveState,
        params: Tree,
        *,
        value_fn: ValueFn | None = None,
        **extra: Any,
    ) -> tuple[Signal, SolveState]:
        del extra
        product = requirements.needed_matvec(
            signal.matvec, signal.factors, "solve", "solves with a curvature product"
        )
        checks.refuse_local(signal.local, stage="solve")
        score = None
        if isinstance(value_fn, Objective):
            score = lambda x: device_mean(value_fn, trees.add_scaled(params, -1.0, x), product.over)
        known = {"factors": signal.factors} if solver.uses_factors else {}
        solution, inner = solver.solve(
            product, signal.updates, state.solver, diagonal=signal.diagonal, score=score, **known
        )
        figures = (solution.steps, solution.residual, solution.reason)[-len(names) :]
        metrics = metrics_of(dict(zip(names, figures)))
        updates = trees.cast_like(solution.x, signal.updates)
        return signal._replace(updates=updates), SolveState(inner, *metrics)

    return stage(init, rule, evaluates_loss=False)


class TrustRegionState(NamedTuple):
    step: jax.Array
    """t, int32 scalar."""
    measured: Flags
    figures: Metrics
    """`kl`, and `trust_scale`, the factor in (0, 1]."""


def trust_region(radius: ScalarOrSchedule) -> Stage:
    """Shortens the updates δ to a ball in the norm of the curvature.

        δ ← δ min(1, r / √(δᵀCδ))

    In the Fisher metric the predictions then change by KL ≈ ½ δᵀFδ <= ½ r². Behind the learning
    rate it bounds the step itself. C is the product without damping. A δ with δᵀCδ <= 0 is not
    shortened. The stage costs one product. Martens, arXiv:1412.1193, sections 6 and 10.

    Args:
        radius: r >= 0: a number, traced or not, or a schedule.

    Returns:
        A stage that needs `matvec`. Its metrics are `kl`, ½ δᵀCδ after shortening, and
        `trust_scale`, the factor in (0, 1].

    Raises:
        ValueError: r < 0; in `update`, no earlier stage set a product, or the updates are local to
            a device axis.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, curvax
        >>> loss = lambda w: 0.5 * jnp.sum(w**2)  # the Hessian is I
        >>> tx = curvax.hessian_matvec() | optax.sgd(1.0) | curvax.trust_region(0.5)
        >>> w = jnp.array([3.0, 4.0])
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> [round(float(x), 3) for x in updates]
        [-0.3, -0.4]
    """
    checks.check_range("radius", radius, 0, jnp.inf, stage="trust_region")

    def init(params: Tree) -> TrustRegionState:
        return TrustRegionState(jnp.zeros((), jnp.int32), *no_metrics("kl", "trust_scale"))

    def rule(
        signal: Signal, state: TrustRegionState, params: Tree = None, **extra: Any
    ) -> tuple[Signal, TrustRegionState]:
        del params, extra
        product = requirements.needed_matvec(
            signal.matvec, signal.factors, "trust_region", "measures a step"
        )
        checks.refuse_local(signal.local, stage="trust_region")
        u, one = _scaled(signal.updates)
        square = product.form(u)
        length = one * root(jnp.maximum(square, 0))
        r = at(radius, state.step)
        scale = jnp.where(length > r, trees.ratio(jnp.asarray(r), length), 1.0)
        metrics = metrics_of(
            {"kl": 0.5 * square * (one * scale) * (one * scale), "trust_scale": scale}
        )
        signal = signal._replace(updates=trees.scale(scale, signal.updates))
        return signal, TrustRegionState(state.step + 1, *metrics)

    return stage(init, rule)


class QuadraticStepState(NamedTuple):
    previous: Tree
    """The last updates, shaped like the parameters."""
    measured: Flags
    figures: Metrics
    """`step_size` α and `momentum` β."""


def quadratic_step(*, momentum: bool = True) -> Stage:
    """Scales the updates, and adds the previous ones, to minimise the damped quadratic model.

        u ← α u + β u₋₁,   (α, β) = argmin  -gᵀu + ½ uᵀ(C + λI)u

    The stage determines the step size; a learning rate of 1 behind it gives the step its sign:
    `solve(cg(20)) | quadratic_step() | optax.scale_by_learning_rate(1.0)`. It costs two products,
    or one without momentum; forward passes only where the root of the product is known and lies on
    one device. Where the model has no minimum along u, α = 1 and β = 0. Martens & Grosse, K-FAC,
    arXiv:1503.05671, section 7.

    Args:
        momentum: whether to add the previous updates.

    Returns:
        A stage that needs `matvec` and goes behind `solve`. Its metrics are `step_size` α and
        `momentum` β.

    Raises:
        ValueError: in `update`, no earlier stage set a product, or the updates are local to a
            device axis.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, curvax
        >>> loss = lambda w: 5 * jnp.sum(w**2)  # the Hessian is 10 I
        >>> tx = curvax.hessian_matvec() | curvax.quadratic_step() | optax.scale(-1.0)
        >>> w = jnp.array([3.0, 4.0])
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> [round(float(x), 3) for x in updates]  # g / 10
        [-3.0, -4.0]
    """

    def init(params: Tree) -> QuadraticStepState:
        previous = jax.tree.map(jnp.zeros_like, params) if momentum else ()
        return QuadraticStepState(previous, *no_metrics("step_size", "momentum"))

    def rule(
        signal: Signal, state: QuadraticStepState, params: Tree = None, **extra: Any
    ) -> tuple[Signal, QuadraticStepState]:
        del params, extra
        product = requirements.needed_matvec(
            signal.matvec, signal.factors, "quadratic_step", "minimises a model"
        )
        checks.refuse_local(signal.local, stage="quadratic_step")
        g, (u, one) = signal.gradient, _scaled(signal.updates)
        gu = trees.dot(g, u)
        if momentum:
            last, one_last = _scaled(state.previous)
            gram = product.gram(u, last)
            alpha, beta = _minimum(gram[0, 0], gram[0, 1], gram[1, 1], gu, trees.dot(g, last), one)
            updates = trees.add(trees.scale(alpha, u), trees.scale(beta, last))
            metrics = metrics_of({"step_size": alpha / one, "momentum": beta / one_last})
        else:
            alpha = _minimum_along(product.gram(u)[0, 0], gu, one)
            updates = trees.scale(alpha, u)
            metrics = metrics_of({"step_size": alpha / one, "momentum": jnp.zeros(())})
        signal = signal._replace(updates=updates)
        previous = _finite_like(updates, state.previous) if momentum else ()
        return signal, QuadraticStepState(previous, *metrics)

    return stage(init, rule)


def _scaled(tree: Tree) -> tuple[Tree, jax.Array]:
    """A vector divided by its magnitude, and the magnitude: squares then stay in the range of
    floats.
    """
    one = trees.magnitude(tree)
    return trees.scale(trees.inverse(one), tree), one


def _finite_like(updates: Tree, last: Tree) -> Tree:
    """The updates to remember, with 0 for entries that are not finite and would stay so."""
    return jax.tree.map(
        lambda x, y: jnp.where(jnp.isfinite(x), x, 0).astype(y.dtype), updates, last
    )


def _minimum(
    uu: jax.Array, uv: jax.Array, vv: jax.Array, gu: jax.Array, gv: jax.Array, one: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(α, β) at the minimum of the model of α u + β v; β = 0 where the model has no minimum or u
    and v are parallel.

    With the lengths √uᵀAu and √vᵀAv factored out, the system is [[1, c], [c, 1]].
    """
    su, sv = root(jnp.maximum(uu, 0)), root(jnp.maximum(vv, 0))
    a, b, c = trees.ratio(gu, su), trees.ratio(gv, sv), trees.ratio(trees.ratio(uv, su), sv)
    gap = 1 - c * c
    alone = (uu <= 0) | (vv <= 0) | (gap <= 8 * jnp.finfo(gap.dtype).eps)
    both = trees.ratio(trees.ratio(a - c * b, gap), su)
    alpha = jnp.where(alone, _minimum_along(uu, gu, one), both)
    beta = jnp.where(alone, 0.0, trees.ratio(trees.ratio(b - c * a, gap), sv))
    return alpha, beta


def _minimum_along(uu: jax.Array, gu: jax.Array, one: jax.Array) -> jax.Array:
    """α at the minimum along u, or `one` (the step as it is) where there is no minimum."""
    return jnp.where(uu > 0, trees.ratio(gu, uu), one)
