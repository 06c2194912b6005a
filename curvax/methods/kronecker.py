"""Methods that precondition with Kronecker factors, each a pipe of a few stages."""

from __future__ import annotations

from typing import Any

import optax

from curvax.arithmetic.typing import Key, ScalarOrSchedule
from curvax.devices.axes import AxisNames
from curvax.hyperparameters import injectable
from curvax.linalg import kronecker
from curvax.objective import Objective
from curvax.pipes.signal import Stage, pipe
from curvax.stages import (
    damp,
    ema_mean,
    every,
    fisher_kronecker,
    fisher_matvec,
    levenberg_marquardt,
    pmean_updates,
    quadratic_step,
    solve,
    trust_region,
)


@injectable
def kfac(
    like: Objective,
    learning_rate: ScalarOrSchedule = 1.0,
    *,
    damping: ScalarOrSchedule = 1e-3,
    decay: ScalarOrSchedule = 0.95,
    factors_every: int = 1,
    inverses_every: int = 5,
    style: str = "heuristic",
    momentum: float | None = None,
    radius: ScalarOrSchedule | None = None,
    adaptive: bool = False,
    sharing: str = "expand",
    bias: str = "joint",
    key: Key = 0,
    mean_over: AxisNames = None,
) -> Stage:
    """K-FAC: natural gradient with the Kronecker factors of the Fisher matrix, F ≈ G ⊗ A.

        fisher_kronecker(like) | ema_mean(β) | damp(λ) | solve(kronecker(every=5))
            | optax.scale_by_learning_rate(α)

    With `adaptive`, λ is adapted, and step size and momentum minimise the quadratic model of the
    batch: `quadratic_step` behind `fisher_matvec`, inside `levenberg_marquardt`. Nothing is
    registered: the model is traced. Martens & Grosse, arXiv:1503.05671; for convolutions Grosse &
    Martens, arXiv:1602.01407. Defaults are those of kfac-jax: β = 0.95, and inverses of damped
    factors every 5 steps.

    Args:
        like: an objective with the model and with shapes of training. Its model is traced by
            `init`; its arrays are not kept.
        learning_rate: α, a number or a schedule.
        damping: λ >= 0, in the units of the curvature: a number or a schedule. With `adaptive`, the
            initial λ > 0.
        decay: β in [0, 1) of the averages of the factors.
        factors_every: number of steps per estimate of the factors.
        inverses_every: number of steps per factorisation.
        style: `heuristic` or `exact`, as in `kronecker`.
        momentum: decay of `optax.trace` in [0, 1); None for none. Not with `adaptive`.
        radius: r > 0 of a trust region in the metric of the factors, a number or a schedule: steps
            δ have δᵀFδ <= r². None for none.
        adaptive: whether to adapt λ, step size and momentum to each batch.
        sharing, bias: as in `kronecker_factors`.
        key: typed PRNG key, or seed, of the drawn labels.
        mean_over: device axis, or tuple of axes, to average gradient and factors over.

    Returns:
        A stage. Each `update` needs `value_fn=` an `Objective` with `model=` and a likelihood.

    Raises:
        ValueError, TypeError: an option is out of range, or is traced where it must be static.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> batch = {"x": jnp.array([[1.0], [2.0]]), "y": jnp.array([[2.0], [4.0]])}
        >>> objective = curvax.Objective(curvax.gaussian("y"), batch, model=lambda w, b: b["x"] @ w)
        >>> tx, w = curvax.kfac(objective, adaptive=True), jnp.zeros((1, 1))
        >>> _, grads = objective.value_and_grad(w)
        >>> updates, state = tx.update(grads, tx.init(w), w, value_fn=objective)
        >>> [round(float(x), 2) for x in (w + updates)[0]]  # the model is quadratic
        [2.0]
    """
    if adaptive and momentum is not None:
        raise ValueError(
            f"`kfac(adaptive=True)` chooses the momentum of each step, and got momentum={momentum}."
            " Leave one of them out."
        )
    estimate = fisher_kronecker(like, key, sharing=sharing, bias=bias, mean_over=mean_over)
    factors = pipe(estimate, ema_mean(decay))
    steps = pipe(
        factors if factors_every == 1 else every(factors_every, factors),
        pmean_updates(mean_over),
        *((fisher_matvec(mean_over=mean_over),) if adaptive else ()),
        damp() if adaptive else damp(damping),
        solve(kronecker(inverses_every, style=style)),
        *((quadratic_step(),) if adaptive else ()),
        *(() if momentum is None else (optax.trace(momentum),)),
        optax.scale_by_learning_rate(learning_rate),
        *(() if radius is None else (trust_region(radius),)),
    )
    start: Any = damping  # a number with `adaptive`, which `levenberg_marquardt` checks
    return levenberg_marquardt(steps, start, mean_over=mean_over) if adaptive else steps
