"""Curvature products: stages that add v ↦ C v to the signal, and the exact diagonal of C."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from curvax import checks
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Key
from curvax.curvature import (
    linearized_empirical_fisher,
    linearized_fisher,
    linearized_gauss_newton,
    linearized_hessian,
)
from curvax.curvature.differentiability import check_mode
from curvax.devices.axes import AxisNames
from curvax.hyperparameters import injectable
from curvax.linalg import exact_diagonal
from curvax.linear_operator import Product
from curvax.objective import LossAndGradient, Objective
from curvax.pipes.signal import Signal, Stage, containing
from curvax.stages.estimation.gradient_sharing import gradient_sharing_stage

Linearize = Callable[[Objective, Tree, jax.Array | None], tuple[LossAndGradient, Product]]
"""(objective, parameters, key) ↦ (((L, aux), ∇L), v ↦ C v), from one linearisation."""


@injectable
def hessian_matvec(
    *,
    mode: str = "auto",
    fraction: float = 1.0,
    precision: str | None = "highest",
    mean_over: AxisNames = None,
) -> Stage:
    """Adds the product with the Hessian of the loss, v ↦ ∇²L(θ) v.

    If the updates are the gradient that `objective.value_and_grad` returned, the stage's own
    gradient replaces them: same values, and one linearisation for both.

    Args:
        mode, precision: differentiation mode and precision of the product, as in `hvp`.
        fraction: fraction of the batch in (0, 1], its first examples, that the curvature is
            computed on.
        mean_over: device axis, or tuple of axes, to average the product over; `()` keeps the
            product of each device.

    Returns:
        A stage that sets `matvec`. It needs `value_fn`.

    Raises:
        ValueError: an option is out of range; in `update`, the loss is local to a device axis and
            `mean_over` is missing.

    Examples:
        >>> import jax, jax.numpy as jnp, curvax
        >>> loss = lambda w: 0.5 * (w[0] ** 2 + 10 * w[1] ** 2)
        >>> stage, w = curvax.hessian_matvec(), jnp.ones(2)
        >>> signal = curvax.Signal(jax.grad(loss)(w))
        >>> signal, state = stage.update(signal, stage.init(w), w, value_fn=loss)
        >>> print(signal.matvec(jnp.array([1.0, 2.0])))
        [ 1. 20.]
    """
    check_mode(mode)
    linearize = lambda objective, params, key: linearized_hessian(
        objective, params, mode=mode, precision=precision
    )
    return _matvec("hessian_matvec", linearize, fraction, mean_over)


@injectable
def gauss_newton_matvec(
    *,
    mode: str = "auto",
    fraction: float = 1.0,
    precision: str | None = "highest",
    mean_over: AxisNames = None,
) -> Stage:
    """Adds the product with the generalised Gauss-Newton matrix, G = mean of Jᵀ ∇²ℓ J.

    G is positive semi-definite for any loss that is convex in the outputs. Martens,
    arXiv:1412.1193.

    Args:
        mode, precision: differentiation mode and precision of the product, as in `ggnvp`.
        fraction: fraction of the batch in (0, 1], its first examples, that the curvature is
            computed on.
        mean_over: device axis, or tuple of axes, to average the product over; `()` keeps the
            product of each device.

    Returns:
        A stage that sets `matvec`. It needs `value_fn=` an `Objective` with `model=`.

    Raises:
        ValueError: an option is out of range; in `update`, the objective has no `model`, or the
            loss is local to a device axis and `mean_over` is missing.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> batch = {"x": jnp.array([[1.0], [2.0]]), "y": jnp.array([[2.0], [4.0]])}
        >>> objective = curvax.Objective(curvax.gaussian("y"), batch, model=lambda w, b: b["x"] * w)
        >>> stage, w = curvax.gauss_newton_matvec(), jnp.zeros(1)
        >>> signal = curvax.Signal(objective.value_and_grad(w)[1])
        >>> signal, state = stage.update(signal, stage.init(w), w, value_fn=objective)
        >>> print(signal.matvec(jnp.ones(1)))  # the mean of x²
        [2.5]
    """
    check_mode(mode)
    linearize = lambda objective, params, key: linearized_gauss_newton(
        objective, params, mode=mode, precision=precision
    )
    return _matvec("gauss_newton_matvec", linearize, fraction, mean_over)


@injectable
def fisher_matvec(
    *,
    samples: int | None = None,
    key: Key = 0,
    mode: str = "auto",
    fraction: float = 1.0,
    precision: str | None = "highest",
    mean_over: AxisNames = None,
) -> Stage:
    """Adds the product with the Fisher matrix, F = mean of E_y[∇log r(y|z) ∇log r(y|z)ᵀ].

    The expectation is over labels y drawn from the model's predictions. Martens, arXiv:1412.1193,
    section 5, eq. 3.

    Args:
        samples: labels drawn per site; None for the exact expectation.
        key: typed PRNG key, or seed, of the labels.
        mode, precision: differentiation mode and precision of the product, as in `fvp`.
        fraction: fraction of the batch in (0, 1], its first examples, that the curvature is
            computed on.
        mean_over: device axis, or tuple of axes, to average the product over; `()` keeps the
            product of each device.

    Returns:
        A stage that sets `matvec`. It needs `value_fn=` an `Objective` with `model=` and a
        likelihood.

    Raises:
        ValueError: an option is out of range; in `update`, the loss is no likelihood, or it is
            local to a device axis and `mean_over` is missing.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> batch = {"x": jnp.array([[1.0], [3.0]]), "y": jnp.array([[2.0], [6.0]])}
        >>> objective = curvax.Objective(curvax.gaussian("y"), batch, model=lambda w, b: b["x"] * w)
        >>> stage, w = curvax.fisher_matvec(), jnp.zeros(1)
        >>> signal = curvax.Signal(objective.value_and_grad(w)[1])
        >>> signal, state = stage.update(signal, stage.init(w), w, value_fn=objective)
        >>> print(signal.matvec(jnp.ones(1)))  # the mean of x²
        [5.]
    """
    check_mode(mode)
    if samples is not None:
        checks.check_count("fisher_matvec", samples=samples)
    linearize = lambda objective, params, key: linearized_fisher(
        objective, params, samples=samples, key=key, mode=mode, precision=precision
    )
    draw = None if samples is None else key
    return _matvec("fisher_matvec", linearize, fraction, mean_over, draw)


@injectable
def empirical_fisher_matvec(
    *,
    mode: str = "auto",
    fraction: float = 1.0,
    precision: str | None = "highest",
    mean_over: AxisNames = None,
) -> Stage:
    """Adds the product with the empirical Fisher matrix, F̄ = mean of gₙ gₙᵀ over the examples.

    gₙ is the gradient at the label of the data, uncentred; far from a good fit F̄ does not
    approximate F. Martens, arXiv:1412.1193, section 11.

    Args:
        mode, precision: differentiation mode and precision of the product, as in `empirical_fvp`.
        fraction: fraction of the batch in (0, 1], its first examples, that the curvature is
            computed on.
        mean_over: device axis, or tuple of axes, to average the product over; `()` keeps the
            product of each device.

    Returns:
        A stage that sets `matvec`. It needs `value_fn=` an `Objective` with a batch.

    Raises:
        ValueError: an option is out of range; in `update`, the objective has no batch, or the loss
            is local to a device axis and `mean_over` is missing.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> loss = lambda w, batch: 0.5 * jnp.mean((batch - w) ** 2)
        >>> objective = curvax.Objective(loss, jnp.array([[1.0], [3.0]]))
        >>> stage, w = curvax.empirical_fisher_matvec(), jnp.zeros(1)
        >>> signal = curvax.Signal(objective.value_and_grad(w)[1])
        >>> signal, state = stage.update(signal, stage.init(w), w, value_fn=objective)
        >>> print(signal.matvec(jnp.ones(1)))  # the mean of 1² and 3²
        [5.]
    """
    check_mode(mode)
    linearize = lambda objective, params, key: linearized_empirical_fisher(
        objective, params, mode=mode, precision=precision
    )
    return _matvec("empirical_fisher_matvec", linearize, fraction, mean_over)


def _matvec(
    name: str,
    linearize: Linearize,
    fraction: float,
    mean_over: AxisNames,
    key: Key | None = None,
) -> Stage:
    """A stage that adds such a product; `key` is None for products that draw no labels."""

    def evaluate(
        here: Objective, params: Tree, draw: jax.Array | None, over: tuple[str, ...]
    ) -> tuple[LossAndGradient, dict[str, Any]]:
        found, product = linearize(here, params, draw)
        return found, {"matvec": product.averaged(over, here.batch_weight())}

    return gradient_sharing_stage(name, evaluate, fraction, mean_over, key)


MATRICES = {
    "hessian": hessian_matvec,
    "gauss_newton": gauss_newton_matvec,
    "fisher": fisher_matvec,
    "empirical_fisher": empirical_fisher_matvec,
}


def exact_diag(
    curvature: str = "hessian", *, mode: str = "auto", mean_over: AxisNames = None
) -> Stage:
    """Computes the exact diagonal of a curvature matrix, at one product per parameter.

    For small models and for tests of the estimators.

    Args:
        curvature: "hessian", "gauss_newton", "fisher" or "empirical_fisher".
        mode: differentiation mode of the products, as in the stage `<curvature>_matvec`.
        mean_over: device axis, or tuple of axes, to average over; `()` keeps the diagonal of each
            device.

    Returns:
        A stage that sets `diagonal`, in float32 or wider, shaped like the parameters. It needs what
        the stage `<curvature>_matvec` needs.

    Raises:
        ValueError: `curvature` or `mode` is unknown.

    Examples:
        >>> import jax, jax.numpy as jnp, curvax
        >>> loss = lambda w: 0.5 * (w[0] ** 2 + 10 * w[1] ** 2)
        >>> stage, w = curvax.exact_diag("hessian"), jnp.ones(2)
        >>> signal = curvax.Signal(jax.grad(loss)(w))
        >>> signal, state = stage.update(signal, stage.init(w), w, value_fn=loss)
        >>> print(signal.diagonal)
        [ 1. 10.]
    """
    if curvature not in MATRICES:
        raise ValueError(
            f"`exact_diag` takes `curvature` as one of {', '.join(map(repr, MATRICES))}, and got "
            f"{curvature!r}."
        )
    matvec = MATRICES[curvature](mode=mode, mean_over=mean_over)

    def rule(
        signal: Signal, state: optax.OptState, params: Tree, **extra: Any
    ) -> tuple[Signal, optax.OptState]:
        inner, state = matvec.update(signal, state, params, **extra)
        diagonal = exact_diagonal(inner.matvec, params)
        return inner._replace(diagonal=diagonal, matvec=signal.matvec), state

    return containing(matvec.init, rule, matvec)
