"""Methods that solve a linear system with a curvature product, each a pipe of a few stages."""

from __future__ import annotations

from typing import Any

import optax

from curvax.arithmetic.typing import Key, Scalar, ScalarOrSchedule
from curvax.devices.axes import AxisNames
from curvax.hyperparameters import injectable
from curvax.linalg import Solver, cg
from curvax.pipes.signal import Stage, pipe
from curvax.stages import (
    damp,
    fisher_matvec,
    gauss_newton_matvec,
    hessian_matvec,
    levenberg_marquardt,
    pmean_updates,
    solve,
    trust_region,
)

TWENTY_STEPS = cg(20)
NEWTON = cg(50, tol=1e-4)
MARTENS = cg(250, tol=0.0, progress=5e-4, warm_start=0.95, backtrack=True)


@injectable
def natural_gradient(
    learning_rate: ScalarOrSchedule = 1.0,
    *,
    damping: ScalarOrSchedule = 1e-3,
    solver: Solver = TWENTY_STEPS,
    momentum: float | None = None,
    radius: ScalarOrSchedule | None = None,
    adaptive: bool = False,
    samples: int | None = None,
    key: Key = 0,
    mode: str = "auto",
    fraction: float = 1.0,
    mean_over: AxisNames = None,
) -> Stage:
    """Natural gradient: steepest descent in the metric of the Fisher matrix.

        fisher_matvec() | damp(λ) | solve(solver) | optax.scale_by_learning_rate(α)

        θ ← θ - α (F + λI)⁻¹ g

    Martens, arXiv:1412.1193, sections 6 and 10.

    Args:
        learning_rate: α, a number or a schedule.
        damping: λ >= 0, in the units of the curvature: a number or a schedule. With `adaptive`, the
            initial λ > 0.
        solver: linear solver, such as `cg(20)`, `dense()` or `row_space()`.
        momentum: decay of `optax.trace` in [0, 1); None for none.
        radius: r > 0 of a trust region, a number or a schedule: no step changes the predictions by
            more than KL ≈ ½ r². None for none.
        adaptive: whether to adapt λ and to undo steps that raise the loss (`levenberg_marquardt`).
        samples: labels drawn per example for a sampled Fisher matrix; None for the exact one.
        key: typed PRNG key, or seed, of the samples.
        mode: differentiation mode of the product, as in `fvp`.
        fraction: fraction of the batch in (0, 1] that the curvature is computed on.
        mean_over: device axis, or tuple of axes, to average gradient and curvature over.

    Returns:
        A stage. Each `update` needs `value_fn=` an `Objective` with `model=` and a likelihood.

    Raises:
        ValueError, TypeError: an option is out of range, or is traced where it must be static.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> batch = {"x": jnp.array([[1.0], [2.0]]), "y": jnp.array([[2.0], [4.0]])}
        >>> objective = curvax.Objective(curvax.gaussian("y"), batch, model=lambda w, b: b["x"] * w)
        >>> tx, w = curvax.natural_gradient(damping=1e-6), jnp.zeros(1)
        >>> _, grads = objective.value_and_grad(w)
        >>> updates, state = tx.update(grads, tx.init(w), w, value_fn=objective)
        >>> [round(float(x), 3) for x in w + updates]  # linear regression is solved in one step
        [2.0]
    """
    matvec = fisher_matvec(
        samples=samples, key=key, mode=mode, fraction=fraction, mean_over=mean_over
    )
    return _solved(
        matvec, learning_rate, damping, solver, mean_over,
        momentum=momentum, radius=radius, adaptive=adaptive,
    )  # fmt: skip


@injectable
def gauss_newton(
    learning_rate: ScalarOrSchedule = 1.0,
    *,
    damping: ScalarOrSchedule = 1e-3,
    solver: Solver = TWENTY_STEPS,
    momentum: float | None = None,
    radius: ScalarOrSchedule | None = None,
    adaptive: bool = False,
    mode: str = "auto",
    fraction: float = 1.0,
    mean_over: AxisNames = None,
) -> Stage:
    """Generalised Gauss-Newton method.

        gauss_newton_matvec() | damp(λ) | solve(solver) | optax.scale_by_learning_rate(α)

        θ ← θ - α (G + λI)⁻¹ g,   G = mean of Jᵀ ∇²ℓ J

    Martens, arXiv:1412.1193.

    Args:
        learning_rate: α, a number or a schedule.
        damping: λ >= 0, in the units of the curvature: a number or a schedule. With `adaptive`, the
            initial λ > 0.
        solver: linear solver of (G + λI) x = g, such as `cg(20)`, `dense()` or `row_space()`.
        momentum: decay of `optax.trace` in [0, 1); None for none.
        radius: r > 0 of a trust region, a number or a schedule: steps δ have δᵀGδ <= r². None for
            none.
        adaptive: whether to adapt λ and to undo steps that raise the loss (`levenberg_marquardt`).
        mode: differentiation mode of the product, as in `ggnvp`.
        fraction: fraction of the batch in (0, 1] that the curvature is computed on.
        mean_over: device axis, or tuple of axes, to average gradient and curvature over.

    Returns:
        A stage. Each `update` needs `value_fn=` an `Objective` with `model=` and a loss of the
        outputs, which is convex if G is to be positive semi-definite.

    Raises:
        ValueError, TypeError: an option is out of range, or is traced where it must be static.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, curvax
        >>> batch = {"x": jnp.array([[1.0], [3.0]]), "y": jnp.array([[2.0], [6.0]])}
        >>> objective = curvax.Objective(curvax.gaussian("y"), batch, model=lambda w, b: b["x"] * w)
        >>> tx, w = curvax.gauss_newton(damping=1e-6), jnp.zeros(1)
        >>> _, grads = objective.value_and_grad(w)
        >>> updates, state = tx.update(grads, tx.init(w), w, value_fn=objective)
        >>> [round(float(x), 3) for x in w + updates]  # linear regression is solved in one step
        [2.0]
    """
    matvec = gauss_newton_matvec(mode=mode, fraction=fraction, mean_over=mean_over)
    return _solved(
        matvec, learning_rate, damping, solver, mean_over,
        momentum=momentum, radius=radius, adaptive=adaptive,
    )  # fmt: skip


@injectable
def hessian_free(
    learning_rate: ScalarOrSchedule = 1.0,
    *,
    damping: Scalar = 1.0,
    solver: Solver = MARTENS,
    mode: str = "auto",
    fraction: float = 1.0,
    mean_over: AxisNames = None,
) -> Stage:
    """Hessian-free optimisation: Gauss-Newton steps by CG, with adaptive damping.

        levenberg_marquardt(gauss_newton_matvec() | damp() | solve(solver)
                            | optax.scale_by_learning_rate(α), λ)

    Martens, Deep learning via Hessian-free optimization (ICML 2010), section 4. The
    default solver stops when the quadratic model no longer decreases, starts from 0.95 times the
    last solution, and returns the iterate of lowest loss.

    Args:
        learning_rate: α, a number or a schedule.
        damping: initial λ > 0, in the units of the curvature.
        solver: linear solver; CG of up to 250 steps by default.
        mode: differentiation mode of the product, as in `ggnvp`.
        fraction: fraction of the batch in (0, 1] that the curvature is computed on.
        mean_over: device axis, or tuple of axes, to average gradient, losses and curvature over.

    Returns:
        A stage. Each `update` needs `value_fn=` an `Objective` with `model=` and a convex loss of
        the outputs.

    Raises:
        ValueError, TypeError: an option is out of range, or is traced where it must be static.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, curvax
        >>> batch = {"x": jnp.array([[1.0], [2.0]]), "y": jnp.array([[3.0], [6.0]])}
        >>> objective = curvax.Objective(curvax.gaussian("y"), batch, model=lambda w, b: b["x"] * w)
        >>> tx, w = curvax.hessian_free(damping=1e-6), jnp.zeros(1)
        >>> _, grads = objective.value_and_grad(w)
        >>> updates, state = tx.update(grads, tx.init(w), w, value_fn=objective)
        >>> [round(float(x), 3) for x in w + updates]  # linear regression is solved in one step
        [3.0]
    """
    matvec = gauss_newton_matvec(mode=mode, fraction=fraction, mean_over=mean_over)
    return _solved(matvec, learning_rate, damping, solver, mean_over, adaptive=True)


@injectable
def newton_cg(
    learning_rate: ScalarOrSchedule = 1.0,
    *,
    damping: ScalarOrSchedule = 0.0,
    solver: Solver = NEWTON,
    adaptive: bool = False,
    mode: str = "auto",
    fraction: float = 1.0,
    mean_over: AxisNames = None,
) -> Stage:
    """Newton-CG: truncated Newton steps that stop at negative curvature.

        hessian_matvec() | damp(λ) | solve(solver) | optax.scale_by_learning_rate(α)

        θ ← θ - α (H + λI)⁻¹ g

    Nocedal & Wright, Numerical Optimization, Algorithm 7.1; with `solver=steihaug(radius)` the
    trust-region method of Algorithm 7.2.

    Args:
        learning_rate: α, a number or a schedule.
        damping: λ >= 0, in the units of the curvature: a number or a schedule. With `adaptive`, the
            initial λ > 0.
        solver: linear solver, such as `cg(50)` or `steihaug(radius)`.
        adaptive: whether to adapt λ and to undo steps that raise the loss (`levenberg_marquardt`).
        mode: differentiation mode of the product, as in `hvp`.
        fraction: fraction of the batch in (0, 1] that the curvature is computed on.
        mean_over: device axis, or tuple of axes, to average gradient and curvature over.

    Returns:
        A stage. Each `update` needs `value_fn`.

    Raises:
        ValueError, TypeError: an option is out of range, or is traced where it must be static.

    Examples:
        >>> import jax, jax.numpy as jnp, curvax
        >>> loss = lambda w: 0.5 * ((w[0] - 1) ** 2 + 10 * (w[1] - 2) ** 2)
        >>> tx, w = curvax.newton_cg(), jnp.zeros(2)
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> [round(float(x), 3) for x in w + updates]  # a quadratic is minimised in one step
        [1.0, 2.0]
    """
    matvec = hessian_matvec(mode=mode, fraction=fraction, mean_over=mean_over)
    return _solved(matvec, learning_rate, damping, solver, mean_over, adaptive=adaptive)


def _solved(
    matvec: Stage,
    learning_rate: ScalarOrSchedule,
    damping: Any,  # a number with `adaptive`, else also a schedule
    solver: Solver,
    mean_over: AxisNames,
    *,
    momentum: float | None = None,
    radius: ScalarOrSchedule | None = None,
    adaptive: bool = False,
) -> Stage:
    """The solution of the damped system, scaled by the learning rate."""
    steps = pipe(
        matvec,
        pmean_updates(mean_over),
        damp() if adaptive else damp(damping),
        solve(solver),
        *(() if momentum is None else (optax.trace(momentum),)),
        optax.scale_by_learning_rate(learning_rate),
        *(() if radius is None else (trust_region(radius),)),
    )
    return levenberg_marquardt(steps, damping, mean_over=mean_over) if adaptive else steps
