"""Methods that precondition with Kronecker factors, each a pipe of a few stages."""

from __future__ import annotations

import numbers
from typing import Any

import optax

from curvax.arithmetic.typing import Key, ScalarOrSchedule
from curvax.devices.axes import AxisNames
from curvax.hyperparameters import injectable
from curvax.linalg import kronecker
from curvax.objective import Objective
from curvax.parameter_roles.layouts import Layout
from curvax.pipes.signal import Stage, pipe
from curvax.stages import (
    accumulate,
    damp,
    ema_mean,
    every,
    fisher_kronecker,
    fisher_matvec,
    gradient_kronecker,
    levenberg_marquardt,
    pmean_updates,
    quadratic_step,
    scale_by_power,
    solve,
    trust_region,
)


@injectable
def kfac(
    like: Objective,
    learning_rate: ScalarOrSchedule = 1.0,
    *,
    damping: ScalarOrSchedule = 1e-2,
    decay: ScalarOrSchedule = 0.95,
    factors_every: int = 1,
    inverses_every: int = 1,
    style: str = "heuristic",
    momentum: float | str | None = None,
    radius: ScalarOrSchedule | None = None,
    adaptive: bool = False,
    sharing: str = "expand",
    bias: str = "joint",
    key: Key = 0,
    fraction: float = 1.0,
    mean_over: AxisNames = None,
) -> Stage:
    """K-FAC: natural gradient with the Kronecker factors of the Fisher matrix, F ≈ G ⊗ A.

        fisher_kronecker(like) | ema_mean(β) | damp(λ) | solve(kronecker())
            | optax.scale_by_learning_rate(α)

    Nothing is registered: the model is traced. Martens & Grosse, arXiv:1503.05671; for convolutions
    Grosse & Martens, arXiv:1602.01407.

    With `momentum="quadratic"` step size and momentum minimise the quadratic model of the batch in
    every step, by `quadratic_step` behind `fisher_matvec` (their section 7), and α only multiplies
    the step: for large batches. For small ones, a learning rate with `momentum=0.9` and a
    `radius`, as Ba et al., Distributed K-FAC (ICLR 2017), section 5, is more robust.

    Args:
        like: an objective with the model and with shapes of training. Its model is traced by
            `init`; its arrays are not kept.
        learning_rate: α, a number or a schedule.
        damping: λ > 0, in the units of the curvature: a number or a schedule. With `adaptive`, the
            initial λ.
        decay: β in [0, 1) of the averages of the factors.
        factors_every: number of steps per estimate of the factors.
        inverses_every: number of steps per inversion. Stale inverses cost steps, most with a
            momentum of the quadratic model; they pay where the factors are large.
        style: `heuristic` or `exact`, as in `kronecker`.
        momentum: decay of `optax.trace` in [0, 1), or "quadratic"; None for none.
        radius: r > 0 of a trust region in the metric of the factors, or of the batch with a
            quadratic momentum: a number or a schedule; steps δ have δᵀFδ <= r². None for none.
        adaptive: whether to adapt λ and to undo steps that raise the loss (`levenberg_marquardt`).
        sharing, bias: as in `kronecker_factors`.
        key: typed PRNG key, or seed, of the drawn labels.
        fraction: fraction of the batch in (0, 1], its first examples, that the curvature is
            computed on.
        mean_over: device axis, or tuple of axes, to average gradient and factors over.

    Returns:
        A stage. Each `update` needs `value_fn=` an `Objective` with `model=` and a likelihood.

    Raises:
        ValueError, TypeError: an option is out of range, or is traced where it must be static.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> batch = {"x": jnp.array([[1.0], [2.0]]), "y": jnp.array([[2.0], [4.0]])}
        >>> objective = curvax.Objective(curvax.gaussian("y"), batch, model=lambda w, b: b["x"] @ w)
        >>> tx, w = curvax.kfac(objective, momentum="quadratic"), jnp.zeros((1, 1))
        >>> _, grads = objective.value_and_grad(w)
        >>> updates, state = tx.update(grads, tx.init(w), w, value_fn=objective)
        >>> [round(float(x), 2) for x in (w + updates)[0]]  # the model is quadratic
        [1.99]
    """
    quadratic = momentum == "quadratic"
    if isinstance(momentum, str) and not quadratic:
        raise ValueError(
            f'`kfac` takes `momentum` as a number in [0, 1), as "quadratic" or None, and got '
            f"{momentum!r}."
        )
    options: Any = dict(sharing=sharing, bias=bias, fraction=fraction, mean_over=mean_over)
    factors = pipe(fisher_kronecker(like, key, **options), ema_mean(decay))
    steps = pipe(
        factors if factors_every == 1 else every(factors_every, factors),
        pmean_updates(mean_over),
        *((fisher_matvec(fraction=fraction, mean_over=mean_over),) if quadratic else ()),
        damp() if adaptive else damp(damping),
        solve(kronecker(inverses_every, style=style)),
        *((quadratic_step(),) if quadratic else ()),
        *((optax.trace(momentum),) if isinstance(momentum, numbers.Real) else ()),
        optax.scale_by_learning_rate(learning_rate),
        *(() if radius is None else (trust_region(radius),)),
    )
    start: Any = damping  # a number with `adaptive`, which `levenberg_marquardt` checks
    return levenberg_marquardt(steps, start, mean_over=mean_over) if adaptive else steps


@injectable
def shampoo(
    learning_rate: ScalarOrSchedule,
    *,
    decay: ScalarOrSchedule | None = None,
    eps: ScalarOrSchedule = 0.0,
    damping: ScalarOrSchedule = 1e-6,
    momentum: float | None = None,
    layout: Layout | None = None,
    largest: int = 8192,
    mean_over: AxisNames = None,
) -> Stage:
    """Shampoo: AdaGrad with Kronecker factors of the gradient, a root of order four on each side.

        gradient_kronecker() | accumulate() | scale_by_power(½)
            | optax.scale_by_learning_rate(α)

        V ← V - α (Σ VVᵀ)^-¼ V (Σ VᵀV)^-¼

    Each step takes an eigendecomposition of every factor. Parameters without two sides are divided
    by the root of the sum of their squares, as in AdaGrad. Gupta et al., arXiv:1802.09568,
    Algorithm 1.

    Args:
        learning_rate: α, a number or a schedule.
        decay: β in [0, 1) of exponential averages of the factors; None for their sum.
        eps: ε >= 0, added to the root.
        damping: λ >= 0, added before the root, in units of squared gradients.
        momentum: decay of `optax.trace` in [0, 1); None for none.
        layout: the axes of inputs, outputs and layers of each parameter, from `curvax.layout`; None
            takes them from names and shapes.
        largest: size of the largest factor.
        mean_over: device axis, or tuple of axes, to average the gradient over.

    Returns:
        A stage. It needs neither a model nor `value_fn`.

    Raises:
        ValueError, TypeError: an option is out of range, or is traced where it must be static.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, curvax
        >>> loss = lambda w: 0.5 * jnp.sum((w - jnp.eye(2)) ** 2)
        >>> tx, w = curvax.shampoo(0.5), jnp.zeros((2, 2))
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w)
        >>> (w + updates).round(3).tolist()
        [[0.5, 0.0], [0.0, 0.5]]
    """
    return pipe(
        pmean_updates(mean_over),
        gradient_kronecker(layout, largest=largest),
        accumulate() if decay is None else ema_mean(decay),
        scale_by_power(0.5, eps=eps, damping=damping),
        *(() if momentum is None else (optax.trace(momentum),)),
        optax.scale_by_learning_rate(learning_rate),
    )
