"""Methods that precondition with Kronecker factors, each a pipe of a few stages."""

from __future__ import annotations

import numbers
from typing import Any

import optax

from curvax.arithmetic.typing import Key, Mask, Period, ScalarOrSchedule
from curvax.devices.axes import AxisNames
from curvax.hyperparameters import injectable
from curvax.linalg import Solver, kronecker
from curvax.objective import Objective
from curvax.parameter_roles.layouts import Layout
from curvax.pipes.signal import Stage, pipe
from curvax.stages import (
    accumulate,
    damp,
    ema_mean,
    every,
    fisher_eigenvalues,
    fisher_kronecker,
    fisher_matvec,
    gradient_kronecker,
    in_eigenbasis,
    levenberg_marquardt,
    pmean_updates,
    quadratic_step,
    scale_by_power,
    solve,
    squared_gradient,
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
        mean_over: device axis, or tuple of axes, to average gradient and factors over, and to
            divide the inversions among.

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
    factors = _averaged(like, key, decay, factors_every, sharing, bias, fraction, mean_over)
    solver = kronecker(inverses_every, style=style, divided_over=mean_over or None)
    options: Any = dict(adaptive=adaptive, fraction=fraction, mean_over=mean_over)
    return _steps(factors, solver, learning_rate, damping, momentum, radius, **options)


@injectable
def ekfac(
    like: Objective,
    learning_rate: ScalarOrSchedule = 1.0,
    *,
    damping: ScalarOrSchedule = 1e-2,
    decay: ScalarOrSchedule = 0.95,
    eigenvalues_decay: ScalarOrSchedule = 0.75,
    factors_every: int = 1,
    bases_every: Period = 1,
    momentum: float | str | None = None,
    radius: ScalarOrSchedule | None = None,
    adaptive: bool = False,
    sharing: str = "expand",
    bias: str = "joint",
    key: Key = 0,
    fraction: float = 1.0,
    mean_over: AxisNames = None,
) -> Stage:
    """E-KFAC: K-FAC with the diagonal of the Fisher matrix in its eigenbasis as eigenvalues.

        fisher_kronecker(like) | ema_mean(β) | in_eigenbasis(fisher_eigenvalues() | ema_mean(β₂))
            | damp(λ) | solve(kronecker()) | optax.scale_by_learning_rate(α)

    Eigenvectors may be kept for many steps, while the eigenvalues follow in each. George et al.,
    arXiv:1806.03884, Algorithm 1; averages of the eigenvalues as in the authors' code.

    Args:
        like: an objective with the model and with shapes of training. Its model is traced by
            `init`; its arrays are not kept.
        learning_rate: α, a number or a schedule.
        damping: λ > 0, in the units of the curvature: a number or a schedule. With `adaptive`, the
            initial λ.
        decay: β in [0, 1) of the averages of the factors.
        eigenvalues_decay: β₂ in [0, 1) of the averages of the eigenvalues.
        factors_every: number of steps per estimate of the factors.
        bases_every: number of steps per eigendecomposition.
        momentum, radius, adaptive: as in `kfac`.
        sharing, bias: as in `kronecker_factors`.
        key: typed PRNG key, or seed, of the drawn labels.
        fraction: fraction of the batch in (0, 1], its first examples, that the curvature is
            computed on.
        mean_over: device axis, or tuple of axes, to average gradient and curvature over, and to
            divide the decompositions among.

    Returns:
        A stage. Each `update` needs `value_fn=` an `Objective` with `model=` and a likelihood.

    Raises:
        ValueError, TypeError: an option is out of range, or is traced where it must be static.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> batch = {"x": jnp.array([[1.0], [2.0]]), "y": jnp.array([[2.0], [4.0]])}
        >>> objective = curvax.Objective(curvax.gaussian("y"), batch, model=lambda w, b: b["x"] @ w)
        >>> tx, w = curvax.ekfac(objective, momentum="quadratic"), jnp.zeros((1, 1))
        >>> _, grads = objective.value_and_grad(w)
        >>> updates, state = tx.update(grads, tx.init(w), w, value_fn=objective)
        >>> [round(float(x), 2) for x in (w + updates)[0]]  # the model is quadratic
        [1.99]
    """
    factors = _averaged(like, key, decay, factors_every, sharing, bias, fraction, mean_over)
    values = fisher_eigenvalues(key, fraction=fraction, mean_over=mean_over)
    corrected = in_eigenbasis(
        values | ema_mean(eigenvalues_decay), every=bases_every, divided_over=mean_over or None
    )
    options: Any = dict(adaptive=adaptive, fraction=fraction, mean_over=mean_over)
    return _steps(
        factors | corrected, kronecker(), learning_rate, damping, momentum, radius, **options
    )


def _averaged(
    like: Objective,
    key: Key,
    decay: ScalarOrSchedule,
    clock: int,
    sharing: str,
    bias: str,
    fraction: float,
    mean_over: AxisNames,
) -> Stage:
    """Averages of the factors of the Fisher matrix, on their clock."""
    options: Any = dict(sharing=sharing, bias=bias, fraction=fraction, mean_over=mean_over)
    factors = pipe(fisher_kronecker(like, key, **options), ema_mean(decay))
    return factors if clock == 1 else every(clock, factors)


def _steps(
    factors: Stage,
    solver: Solver,
    learning_rate: ScalarOrSchedule,
    damping: ScalarOrSchedule,
    momentum: float | str | None,
    radius: ScalarOrSchedule | None,
    *,
    adaptive: bool,
    fraction: float,
    mean_over: AxisNames,
) -> Stage:
    """Steps from factors: the natural gradient with its damping, momentum and trust region."""
    quadratic = momentum == "quadratic"
    if isinstance(momentum, str) and not quadratic:
        raise ValueError(
            f'`momentum` is a number in [0, 1), "quadratic" or None, and is {momentum!r}.'
        )
    steps = pipe(
        factors,
        pmean_updates(mean_over),
        *((fisher_matvec(fraction=fraction, mean_over=mean_over),) if quadratic else ()),
        damp() if adaptive else damp(damping),
        solve(solver),
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
    every: Period = 1,
    layout: Layout | None = None,
    largest: int = 8192,
    mean_over: AxisNames = None,
) -> Stage:
    """Shampoo: AdaGrad with Kronecker factors of the gradient, a root of order four on each side.

        gradient_kronecker() | accumulate() | scale_by_power(½)
            | optax.scale_by_learning_rate(α)

        V ← V - α (Σ VVᵀ)^-¼ V (Σ VᵀV)^-¼

    Parameters without two sides are divided by the root of the sum of their squares, as in AdaGrad.
    Gupta et al., arXiv:1802.09568, Algorithm 1.

    Args:
        learning_rate: α, a number or a schedule.
        decay: β in [0, 1) of exponential averages of the factors; None for their sum.
        eps: ε >= 0, added to the root.
        damping: λ >= 0, added before the root, in units of squared gradients.
        momentum: decay of `optax.trace` in [0, 1); None for none.
        every: number of steps per eigendecomposition of the factors.
        layout: the axes of inputs, outputs and layers of each parameter, from `curvax.layout`; None
            takes them from names and shapes.
        largest: size of the largest factor.
        mean_over: device axis, or tuple of axes, to average the gradient over, and to divide the
            eigendecompositions among.

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
        scale_by_power(0.5, eps=eps, damping=damping, every=every, divided_over=mean_over or None),
        *(() if momentum is None else (optax.trace(momentum),)),
        optax.scale_by_learning_rate(learning_rate),
    )


@injectable
def soap(
    learning_rate: ScalarOrSchedule = 3e-3,
    b1: ScalarOrSchedule = 0.95,
    b2: ScalarOrSchedule = 0.95,
    *,
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0.01,
    mask: Mask | None = None,
    every: Period = 10,
    style: str = "iteration",
    layout: Layout | None = None,
    largest: int = 8192,
    mean_over: AxisNames = None,
) -> Stage:
    """SOAP: Adam in the eigenbasis of Shampoo's factors.

        gradient_kronecker() | ema_mean(b2, lag=1)
            | in_eigenbasis(squared_gradient() | ema_mean(b2), every=10, style="iteration")
            | optax.ema(b1) | scale_by_power(½) | optax.add_decayed_weights(weight_decay)
            | optax.scale_by_learning_rate(learning_rate)

    The basis of a step is that of earlier gradients, `lag=1`: in its own basis a gradient is
    diagonal, and Adam would divide the rounding errors beside the diagonal by themselves. The first
    step, and every step of parameters without two sides, is that of AdamW. Vyas et al.,
    arXiv:2409.11321, Algorithm 3, with the defaults of the authors' code, which skips the first
    step.

    Args:
        learning_rate: α, a number or a schedule.
        b1: decay in [0, 1) of the average of the gradients.
        b2: decay in [0, 1) of the averages of their squares, and of the factors.
        eps: ε >= 0, added to the root.
        weight_decay: of AdamW, a number or a schedule.
        mask: which leaves are decayed, as in `optax.adamw`.
        every: number of steps per change of the basis.
        style: `iteration` or `exact`, as in `in_eigenbasis`.
        layout: the axes of inputs, outputs and layers of each parameter, from `curvax.layout`; None
            takes them from names and shapes.
        largest: size of the largest factor. A kernel with more inputs or outputs takes the step of
            AdamW.
        mean_over: device axis, or tuple of axes, to average the gradient over, and to divide the
            decompositions among.

    Returns:
        A stage. It needs neither a model nor `value_fn`.

    Raises:
        ValueError, TypeError: an option is out of range, or is traced where it must be static.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, curvax
        >>> loss = lambda w: 0.5 * jnp.sum((w - jnp.eye(2)) ** 2)
        >>> tx, w = curvax.soap(0.5, weight_decay=0.0), jnp.zeros((2, 2))
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w)
        >>> (w + updates).round(3).tolist()
        [[0.5, 0.0], [0.0, 0.5]]
    """
    return pipe(
        pmean_updates(mean_over),
        gradient_kronecker(layout, largest=largest),
        ema_mean(b2, lag=1),
        in_eigenbasis(
            squared_gradient() | ema_mean(b2),
            every=every,
            style=style,
            divided_over=mean_over or None,
        ),
        optax.ema(b1),
        scale_by_power(0.5, eps=eps),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
