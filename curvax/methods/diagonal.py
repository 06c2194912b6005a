"""Methods that precondition with a curvature diagonal, each a pipe of a few stages."""

from __future__ import annotations

import optax

from curvax import checks, stages
from curvax.arithmetic.typing import Key, Mask, Period, Sampler, ScalarOrSchedule
from curvax.devices.axes import AxisNames
from curvax.hyperparameters import injectable
from curvax.linalg import rademacher
from curvax.pipes.signal import Stage, pipe
from curvax.stages import (
    clip_by_diagonal,
    ema_mean,
    ema_rms,
    fisher_diag,
    hutchinson_diag,
    pmean_updates,
    scale_by_power,
    spatial_average,
)
from curvax.stages.smoothing.spatial import Block, BlockRule


@injectable
def adahessian(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    *,
    eps: ScalarOrSchedule = 1e-4,
    power: ScalarOrSchedule = 1.0,
    block: str | BlockRule | Block = "auto",
    magnitudes: bool = True,
    every: Period = 1,
    probes: int = 1,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    key: Key = 0,
    mode: str = "auto",
    mean_over: AxisNames = None,
) -> Stage:
    """AdaHessian: Adam with the Hessian diagonal in place of the squared gradient.

        hutchinson_diag() | spatial_average() | ema_rms(b2) | optax.ema(b1)
        | scale_by_power(power) | optax.scale_by_learning_rate(learning_rate)

    Yao et al., AdaHessian, arXiv:2006.00719, Algorithm 1. The defaults are those of the authors'
    image code, with a learning rate of 0.15.

    Args:
        learning_rate: α, a number or a schedule.
        b1: β₁ in [0, 1), decay of the gradient's mean: a number or a schedule.
        b2: β₂ in [0, 1), decay of the diagonal's mean square; 0 removes the Hessian momentum.
        eps: ε >= 0, added to the denominator.
        power: k in [0, 1], exponent of the diagonal; 1 is a diagonal Newton step.
        block: block of weights to average the diagonal over: "auto" (convolution windows), an int,
            a callable `(path, leaf) -> None, int or axes`, or None for no average.
        magnitudes: whether to average |D| (the authors' code) rather than D (eq. 10).
        every: estimate the diagonal every k-th step only.
        probes: Hutchinson probes per estimate.
        weight_decay: decoupled weight decay, as in `optax.adamw`.
        mask: tree prefix of booleans, or a callable `params -> tree`: the leaves that decay.
        key: typed PRNG key, or seed, of the probes.
        mode: differentiation mode of the Hessian product, as in `hvp`.
        mean_over: device axis, or tuple of axes, to average gradient and diagonal over.

    Returns:
        A stage. Each `update` needs `value_fn`.

    Raises:
        ValueError, TypeError: an option is out of range, or is traced where it must be static.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, curvax
        >>> loss = lambda w: 0.5 * ((w[0] - 1) ** 2 + 10 * (w[1] - 2) ** 2)
        >>> tx = curvax.adahessian(learning_rate=1.0)
        >>> w = jnp.zeros(2)
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> [round(float(x), 2) for x in w + updates]  # exact for a diagonal Hessian
        [1.0, 2.0]
    """
    estimate = hutchinson_diag(key, probes=probes, mode=mode, mean_over=mean_over)
    smooth = () if block is None else (spatial_average(block, magnitudes=magnitudes),)
    return pipe(
        _every(every, estimate),
        *smooth,
        ema_rms(b2),
        pmean_updates(mean_over),
        _momentum("adahessian", b1),
        scale_by_power(power, eps=eps),
        *_descent(learning_rate, weight_decay, mask),
    )


@injectable
def diagonal_natural_gradient(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.0,
    b2: ScalarOrSchedule = 0.999,
    *,
    damping: ScalarOrSchedule = 1e-3,
    power: ScalarOrSchedule = 1.0,
    every: Period = 1,
    probes: int = 1,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    key: Key = 0,
    mean_over: AxisNames = None,
) -> Stage:
    """Natural gradient with the diagonal of the Fisher matrix.

        fisher_diag() | ema_mean(b2) | optax.ema(b1) | scale_by_power(ξ, eps=0, damping=λ)
        | optax.scale_by_learning_rate(learning_rate)

        θ ← θ - α (B + λI)^-ξ g,   B ≈ diag F

    Martens, arXiv:1412.1193, eq. 10. B comes from labels drawn from the model's predictions; Adam
    uses the labels of the data (the empirical Fisher).

    Args:
        learning_rate: α, a number or a schedule.
        b1, b2: β₁, β₂ in [0, 1), decays of the means of g and of B: numbers or schedules.
        damping: λ >= 0, in the units of the curvature: a number or a schedule.
        power: ξ in [0, 1].
        every, probes: estimate B every k-th step only, from this number of labels per example.
        key: typed PRNG key, or seed, of the labels.
        weight_decay, mask: decoupled weight decay as in `optax.adamw`, and the leaves that decay, a
            tree prefix of booleans or a callable `params -> tree`.
        mean_over: device axis, or tuple of axes, to average gradient and diagonal over.

    Returns:
        A stage. Each `update` needs `value_fn=` an `Objective` with `model=` and a likelihood.

    Raises:
        ValueError, TypeError: an option is out of range, or is traced where it must be static; in
            `update`, the loss is no likelihood.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, curvax
        >>> batch = {"x": jnp.array([[1.0], [2.0]]), "y": jnp.array([[2.0], [4.0]])}
        >>> objective = curvax.Objective(curvax.gaussian("y"), batch, model=lambda w, b: b["x"] * w)
        >>> tx, w = curvax.diagonal_natural_gradient(0.1), jnp.ones(1)
        >>> _, grads = objective.value_and_grad(w)
        >>> updates, state = tx.update(grads, tx.init(w), w, value_fn=objective)
        >>> updates.shape
        (1,)
    """
    return pipe(
        _every(every, fisher_diag(key, probes=probes, mean_over=mean_over)),
        ema_mean(b2),
        pmean_updates(mean_over),
        _momentum("diagonal_natural_gradient", b1),
        scale_by_power(power, eps=0.0, damping=damping),
        *_descent(learning_rate, weight_decay, mask),
    )


@injectable
def sophia_h(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.965,
    b2: ScalarOrSchedule = 0.99,
    *,
    eps: ScalarOrSchedule = 1e-8,
    gamma: ScalarOrSchedule = 0.01,
    threshold: ScalarOrSchedule | None = 1.0,
    every: Period = 10,
    probes: int = 1,
    sampler: Sampler = rademacher,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: Mask | None = None,
    key: Key = 0,
    mode: str = "auto",
    mean_over: AxisNames = None,
) -> Stage:
    """Sophia-H: momentum divided by a Hessian diagonal and clipped entry by entry.

        every(10, hutchinson_diag() | ema_mean(b2, debias=False)) | ema_mean(0.0, lag=1)
        | optax.ema(b1) | clip_by_diagonal(gamma) | add_decayed_weights | learning rate

        θ ← θ - α clip(m / max(γ D, ε), -τ, τ)

    Liu et al., Sophia, arXiv:2305.14342, Algorithm 3. Steps and defaults are those of
    `optax.contrib.sophia`, which divides by the diagonal of the step before: D is 0 at first, so
    the first step is a signed one.

    Args:
        learning_rate: α, a number or a schedule.
        b1: β₁ in [0, 1), decay of the gradient's mean: a number or a schedule.
        b2: β₂ in [0, 1), decay of the diagonal's mean, per estimate.
        eps: ε > 0, lower bound of the denominator.
        gamma: γ > 0, scale of the diagonal: a number or a schedule.
        threshold: τ > 0, largest magnitude of an entry; None for no clipping.
        every: estimate the diagonal every k-th step only.
        probes, sampler: Hutchinson probes per estimate, and the function that draws one,
            `sampler(key, tree) -> tree` with identity covariance.
        weight_decay, mask: decoupled weight decay as in `optax.adamw`, and the leaves that decay, a
            tree prefix of booleans or a callable `params -> tree`.
        key: typed PRNG key, or seed, of the probes.
        mode: differentiation mode of the Hessian product, as in `hvp`.
        mean_over: device axis, or tuple of axes, to average gradient and diagonal over.

    Returns:
        A stage. Each `update` needs `value_fn`; every k-th takes a Hessian product per probe.

    Raises:
        ValueError, TypeError: an option is out of range, or is traced where it must be static.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, curvax
        >>> loss = lambda w: 0.5 * jnp.sum(w**2)
        >>> tx = curvax.sophia_h(learning_rate=0.1, weight_decay=0.0)
        >>> w = jnp.array([3.0, -4.0])
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> [round(float(x), 3) for x in updates]  # signed, before the diagonal is in use
        [-0.1, 0.1]
    """
    estimate = hutchinson_diag(key, probes=probes, sampler=sampler, mode=mode, mean_over=mean_over)
    return pipe(
        _delayed(every, estimate, b2),
        pmean_updates(mean_over),
        _momentum("sophia_h", b1),
        clip_by_diagonal(gamma, eps=eps, threshold=threshold),
        *_descent(learning_rate, weight_decay, mask),
    )


@injectable
def sophia_g(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.965,
    b2: ScalarOrSchedule = 0.99,
    *,
    eps: ScalarOrSchedule = 1e-8,
    gamma: ScalarOrSchedule = 0.05,
    threshold: ScalarOrSchedule | None = 1.0,
    every: Period = 10,
    probes: int = 1,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: Mask | None = None,
    key: Key = 0,
    mean_over: AxisNames = None,
) -> Stage:
    """Sophia-G: Sophia with the Fisher diagonal, from labels drawn from the model's predictions.

        every(10, fisher_diag() | ema_mean(b2, debias=False)) | ema_mean(0.0, lag=1)
        | optax.ema(b1) | clip_by_diagonal(gamma) | add_decayed_weights | learning rate

        θ ← θ - α clip(m / max(γ D, ε), -τ, τ)

    Liu et al., Sophia, arXiv:2305.14342, Algorithms 2 and 3; γ = 0.05 there. The diagonal in use is
    that of the step before, so the first step is a signed one.

    Args:
        learning_rate: α, a number or a schedule.
        b1: β₁ in [0, 1), decay of the gradient's mean: a number or a schedule.
        b2: β₂ in [0, 1), decay of the diagonal's mean, per estimate.
        eps, gamma: ε > 0 and γ > 0 of the denominator max(γ D, ε); γ is a number or a schedule.
        threshold: τ > 0, the bound of each entry; None for no clipping.
        every: estimate the diagonal every k-th step only.
        probes: labels drawn per example and estimate.
        weight_decay, mask: decoupled weight decay as in `optax.adamw`, and the leaves that decay, a
            tree prefix of booleans or a callable `params -> tree`.
        key: typed PRNG key, or seed, of the labels.
        mean_over: device axis, or tuple of axes, to average gradient and diagonal over.

    Returns:
        A stage. Each `update` needs `value_fn=` an `Objective` with `model=` and a likelihood.

    Raises:
        ValueError, TypeError: an option is out of range, or is traced where it must be static; or
            the objective that `update` receives has no likelihood.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, curvax
        >>> batch = {"x": jnp.array([[1.0], [2.0]]), "y": jnp.array([[2.0], [4.0]])}
        >>> objective = curvax.Objective(curvax.gaussian("y"), batch, model=lambda w, b: b["x"] * w)
        >>> tx, w = curvax.sophia_g(learning_rate=0.1, weight_decay=0.0), jnp.ones(1)
        >>> _, grads = objective.value_and_grad(w)
        >>> updates, state = tx.update(grads, tx.init(w), w, value_fn=objective)
        >>> [round(float(x), 3) for x in updates]  # signed, before the diagonal is in use
        [0.1]
    """
    return pipe(
        _delayed(every, fisher_diag(key, probes=probes, mean_over=mean_over), b2),
        pmean_updates(mean_over),
        _momentum("sophia_g", b1),
        clip_by_diagonal(gamma, eps=eps, threshold=threshold),
        *_descent(learning_rate, weight_decay, mask),
    )


def _every(k: Period, estimate: Stage) -> Stage:
    """The estimate every k steps; for k = 1 as it is, so that it shares the caller's gradient."""
    return estimate if isinstance(k, int) and k == 1 else stages.every(k, estimate)


def _delayed(k: Period, estimate: Stage, b2: ScalarOrSchedule) -> Stage:
    """Sophia's diagonal: the mean over estimates, as it was one step before."""
    smoothed = stages.every(k, pipe(estimate, ema_mean(b2, debias=False)))
    return pipe(smoothed, ema_mean(0.0, debias=False, lag=1))


def _momentum(method: str, b1: ScalarOrSchedule) -> optax.GradientTransformation:
    """The mean of past gradients, with a number or a schedule for its decay."""
    checks.check_decay("b1", b1, stage=method)
    return optax.inject_hyperparams(optax.ema)(b1) if callable(b1) else optax.ema(b1)


def _descent(
    learning_rate: ScalarOrSchedule, weight_decay: ScalarOrSchedule, mask: Mask | None
) -> tuple[optax.GradientTransformation, ...]:
    """Decoupled weight decay and the learning rate."""
    decay = optax.add_decayed_weights(weight_decay, mask)
    return decay, optax.scale_by_learning_rate(learning_rate)
