"""Methods that solve with a curvature product, each one pipe."""

from typing import Any

import jax
import optax

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
    learning_rate: Any = 1.0,
    *,
    damping: Any = 1e-3,
    solver: Solver = TWENTY_STEPS,
    momentum: float | None = None,
    radius: Any = None,
    adaptive: bool = False,
    samples: int | None = None,
    key: jax.Array | int = 0,
    mode: str = "auto",
    fraction: float = 1.0,
    mean_over: AxisNames = None,
) -> Stage:
    """The natural gradient: θ ← θ - α (F + λI)⁻¹ g.

        fisher_matvec() | damp(λ) | solve(solver) | optax.scale_by_learning_rate(α)

    Each update needs an `Objective` with `model=` and a likelihood. Martens, arXiv:1412.1193,
    sections 6 and 10.

    Args:
        learning_rate: α, a number or a schedule.
        damping: λ, a number or a schedule; where `adaptive`, the λ of the start.
        solver: `cg(20)`, `dense()`, `row_space()`.
        momentum: the decay of `optax.trace`.
        radius: r of `trust_region`: no step moves the predictions by more than KL ≈ ½ r².
        adaptive: adapt λ, and undo steps that raise the loss, with `levenberg_marquardt`.
        samples: labels drawn per example, for a sampled Fisher matrix; None for the exact one.
        key: a typed key or a seed, for the samples.
        mode: of the curvature product: "auto", "forward-over-reverse", "reverse-over-reverse" or
            "finite-differences", as in `ggnvp` and `hvp`.
        fraction: of the batch that is used for curvature.
        mean_over: the device axis, or axes, to average gradient and curvature over.
    """
    matvec = fisher_matvec(
        samples=samples, key=key, mode=mode, fraction=fraction, mean_over=mean_over
    )
    return _solved(matvec, learning_rate, damping, solver, momentum, radius, adaptive, mean_over)


@injectable
def gauss_newton(
    learning_rate: Any = 1.0,
    *,
    damping: Any = 1e-3,
    solver: Solver = TWENTY_STEPS,
    momentum: float | None = None,
    radius: Any = None,
    adaptive: bool = False,
    mode: str = "auto",
    fraction: float = 1.0,
    mean_over: AxisNames = None,
) -> Stage:
    """Generalised Gauss-Newton: θ ← θ - α (G + λI)⁻¹ g, G = mean of Jᵀ ∇²ℓ J.

        gauss_newton_matvec() | damp(λ) | solve(solver) | optax.scale_by_learning_rate(α)

    Each update needs an `Objective` with `model=`; any convex loss of the outputs will do.
    Martens, arXiv:1412.1193. The options are those of `natural_gradient`.
    """
    matvec = gauss_newton_matvec(mode=mode, fraction=fraction, mean_over=mean_over)
    return _solved(matvec, learning_rate, damping, solver, momentum, radius, adaptive, mean_over)


@injectable
def hessian_free(
    learning_rate: Any = 1.0,
    *,
    damping: Any = 1.0,
    solver: Solver = MARTENS,
    mode: str = "auto",
    fraction: float = 1.0,
    mean_over: AxisNames = None,
) -> Stage:
    """Hessian-free optimisation: Gauss-Newton steps by long CG runs under an adapted λ.

        levenberg_marquardt(gauss_newton_matvec() | damp() | solve(solver)
                            | optax.scale_by_learning_rate(α), λ)

    CG stops when it makes no more progress, starts from 0.95 times its last solution, and hands on
    the best of its iterates. Martens, Hessian-free optimization (ICML 2010). The options are those
    of `natural_gradient`, `damping` the λ of the start.
    """
    matvec = gauss_newton_matvec(mode=mode, fraction=fraction, mean_over=mean_over)
    return _solved(matvec, learning_rate, damping, solver, None, None, True, mean_over)


@injectable
def newton_cg(
    learning_rate: Any = 1.0,
    *,
    damping: Any = 0.0,
    solver: Solver = NEWTON,
    adaptive: bool = False,
    mode: str = "auto",
    fraction: float = 1.0,
    mean_over: AxisNames = None,
) -> Stage:
    """Truncated Newton: θ ← θ - α (H + λI)⁻¹ g, cut off where the Hessian curves downwards.

        hessian_matvec() | damp(λ) | solve(solver) | optax.scale_by_learning_rate(α)

    With `solver=steihaug(radius)` it is the trust-region method. Each update needs `value_fn`.
    Nocedal & Wright, Numerical Optimization, Algorithms 7.1 and 7.2. The options are those of
    `natural_gradient`.
    """
    matvec = hessian_matvec(mode=mode, fraction=fraction, mean_over=mean_over)
    return _solved(matvec, learning_rate, damping, solver, None, None, adaptive, mean_over)


def _solved(
    matvec: Stage,
    learning_rate: Any,
    damping: Any,
    solver: Solver,
    momentum: float | None,
    radius: Any,
    adaptive: bool,
    mean_over: AxisNames,
) -> Stage:
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
