"""Methods that divide by a curvature diagonal, each one pipe."""

from typing import Any

import jax
import optax

from curvax import checks, stages
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


@injectable
def adahessian(
    learning_rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.999,
    *,
    eps: Any = 1e-4,
    power: Any = 1.0,
    block: Any = "auto",
    magnitudes: bool = True,
    every: Any = 1,
    probes: int = 1,
    weight_decay: Any = 0.0,
    mask: Any = None,
    key: jax.Array | int = 0,
    mode: str = "auto",
    mean_over: AxisNames = None,
) -> Stage:
    """AdaHessian: Adam with the Hessian diagonal in the place of the gradient's square.

        hutchinson_diag() | spatial_average() | ema_rms(b2) | optax.ema(b1)
        | scale_by_power(power) | optax.scale_by_learning_rate(learning_rate)

    The defaults are those of the authors' image code, whose learning rate was 0.15. `b2=0`
    removes the Hessian momentum, `block=None` the spatial averaging; weight decay is decoupled,
    and `mask` is its mask as in `optax.adamw`. Each update needs `value_fn`. Yao et al.,
    AdaHessian, arXiv:2006.00719, Algorithm 1. The options are those of the stages, `mode` that of
    the Hessian product.
    """
    diagonal = _every(every, hutchinson_diag(key, probes=probes, mode=mode, mean_over=mean_over))
    smooth = () if block is None else (spatial_average(block, magnitudes=magnitudes),)
    divide = scale_by_power(power, eps=eps)
    return _divided(
        "adahessian", pipe(diagonal, *smooth, ema_rms(b2)), divide, learning_rate, b1,
        weight_decay, mask, mean_over,
    )  # fmt: skip


@injectable
def diagonal_natural_gradient(
    learning_rate: Any,
    b1: Any = 0.0,
    b2: Any = 0.999,
    *,
    damping: Any = 1e-3,
    power: Any = 1.0,
    every: Any = 1,
    probes: int = 1,
    weight_decay: Any = 0.0,
    mask: Any = None,
    key: jax.Array | int = 0,
    mean_over: AxisNames = None,
) -> Stage:
    """The natural gradient with the diagonal of the Fisher matrix: θ ← θ - α (B + λI)^-ξ g.

        fisher_diag() | ema_mean(b2) | optax.ema(b1) | scale_by_power(ξ, eps=0, damping=λ)
        | optax.scale_by_learning_rate(learning_rate)

    The diagonal comes from labels drawn from the model, not from the data's own as in Adam. Each
    update needs an `Objective` with `model=` and a likelihood. Martens, arXiv:1412.1193, eq. 10.
    The options are those of the stages, `power` ξ in (0, 1].
    """
    diagonal = _every(every, fisher_diag(key, probes=probes, mean_over=mean_over))
    divide = scale_by_power(power, eps=0.0, damping=damping)
    return _divided(
        "diagonal_natural_gradient", pipe(diagonal, ema_mean(b2)), divide, learning_rate, b1,
        weight_decay, mask, mean_over,
    )  # fmt: skip


@injectable
def sophia_h(
    learning_rate: Any,
    b1: Any = 0.965,
    b2: Any = 0.99,
    *,
    eps: Any = 1e-8,
    gamma: Any = 0.01,
    threshold: Any = 1.0,
    every: Any = 10,
    probes: int = 1,
    sampler: Any = rademacher,
    weight_decay: Any = 1e-4,
    mask: Any = None,
    key: jax.Array | int = 0,
    mode: str = "auto",
    mean_over: AxisNames = None,
) -> Stage:
    """Sophia-H: momentum, divided by a Hessian diagonal refreshed now and then, and clipped.

        every(10, hutchinson_diag() | ema_mean(b2, debias=False)) | ema_mean(0.0, lag=1)
        | optax.ema(b1) | clip_by_diagonal(gamma) | add_decayed_weights | learning rate

    Steps and defaults are those of `optax.contrib.sophia`, whose step divides by the diagonal as
    it stood before: the first step is one of signs. Each update needs `value_fn`. Liu et al.,
    Sophia, arXiv:2305.14342, Algorithm 3. The options are those of the stages, `mode` that of the
    Hessian product.
    """
    estimate = hutchinson_diag(key, probes=probes, sampler=sampler, mode=mode, mean_over=mean_over)
    divide = clip_by_diagonal(gamma, eps=eps, threshold=threshold)
    return _divided(
        "sophia_h", _delayed(every, estimate, b2), divide, learning_rate, b1, weight_decay, mask,
        mean_over,
    )  # fmt: skip


@injectable
def sophia_g(
    learning_rate: Any,
    b1: Any = 0.965,
    b2: Any = 0.99,
    *,
    eps: Any = 1e-8,
    gamma: Any = 0.05,
    threshold: Any = 1.0,
    every: Any = 10,
    probes: int = 1,
    weight_decay: Any = 1e-4,
    mask: Any = None,
    key: jax.Array | int = 0,
    mean_over: AxisNames = None,
) -> Stage:
    """Sophia-G: Sophia with the Fisher diagonal from labels drawn from the model.

        every(10, fisher_diag() | ema_mean(b2, debias=False)) | ema_mean(0.0, lag=1)
        | optax.ema(b1) | clip_by_diagonal(gamma) | add_decayed_weights | learning rate

    Each update needs an `Objective` with `model=` and a likelihood. Liu et al., Sophia,
    arXiv:2305.14342, Algorithms 2 and 3; γ = 0.05 there. The options are those of the stages.
    """
    estimate = fisher_diag(key, probes=probes, mean_over=mean_over)
    divide = clip_by_diagonal(gamma, eps=eps, threshold=threshold)
    return _divided(
        "sophia_g", _delayed(every, estimate, b2), divide, learning_rate, b1, weight_decay, mask,
        mean_over,
    )  # fmt: skip


def _divided(
    name: str,
    diagonal: Stage,
    divide: Stage,
    learning_rate: Any,
    b1: Any,
    weight_decay: Any,
    mask: Any,
    mean_over: AxisNames,
) -> Stage:
    """Momentum, divided by a diagonal, with decoupled weight decay."""
    checks.check_decay("b1", b1, stage=name)
    return pipe(
        diagonal,
        pmean_updates(mean_over),
        optax.inject_hyperparams(optax.ema)(b1) if callable(b1) else optax.ema(b1),
        divide,
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _delayed(k: Any, estimate: Stage, b2: Any) -> Stage:
    """Sophia's diagonal: averaged over refreshes, as it stood a step before."""
    refreshed = stages.every(k, pipe(estimate, ema_mean(b2, debias=False)))
    return pipe(refreshed, ema_mean(0.0, debias=False, lag=1))


def _every(k: Any, estimate: Stage) -> Stage:
    return estimate if isinstance(k, int) and k == 1 else stages.every(k, estimate)
