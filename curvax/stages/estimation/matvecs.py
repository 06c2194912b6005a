"""Curvature as a product: stages that put v ↦ C v into the signal, and the exact diagonal of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
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
from curvax.objective import Objective, as_objective
from curvax.pipes.signal import Signal, Stage, containing, stage
from curvax.pipes.state_keys import DrawingKey
from curvax.stages.estimation.diagonal_stage import check_fraction, settled, share_gradient

Linearize = Callable[[Objective, Tree, jax.Array | None], tuple[Any, Product]]
"""(objective, parameters, key) ↦ (((L, aux), ∇L), v ↦ C v), one linearisation for both."""


class DrawState(NamedTuple):
    key: jax.Array
    """The data of a key, uint32; labels are drawn by step and by example of the global batch."""
    step: jax.Array
    """t, int32 scalar."""


@injectable
def hessian_matvec(
    *, mode: str = "auto", fraction: float = 1.0, precision: Any = "highest",
    mean_over: AxisNames = None,
) -> Stage:  # fmt: skip
    """The product with the Hessian of the loss, H = ∇²L(θ).

    Args:
        mode: of the product, as in `hvp`.
        fraction: of the batch (its first part) that is used for curvature.
        precision: of matrix products within it, as `jax.default_matmul_precision` takes it.
        mean_over: the device axis, or axes, to average the product over; `()` keeps each
            device's own.

    Returns:
        A stage that sets `matvec`. Handed the very gradient that `objective.value_and_grad`
        returned, it passes on its own copy of it, so that the two share one pass.

    Raises:
        ValueError: an option out of range; later, under a device axis, no `mean_over`.
    """
    check_mode(mode)
    linearize = lambda objective, params, key: linearized_hessian(
        objective, params, mode=mode, precision=precision
    )
    return _matvec("hessian_matvec", linearize, fraction, mean_over)


@injectable
def gauss_newton_matvec(
    *, mode: str = "auto", fraction: float = 1.0, precision: Any = "highest",
    mean_over: AxisNames = None,
) -> Stage:  # fmt: skip
    """The product with the generalised Gauss-Newton matrix, G = mean of Jᵀ ∇²ℓ J.

    Positive semi-definite for any convex loss of the outputs. It needs an `Objective` with
    `model=`. Martens, arXiv:1412.1193. The rest as in `hessian_matvec`.

    Args:
        mode: of the product, as in `ggnvp`.
        fraction: of the batch (its first part) that is used for curvature.
        precision: of matrix products within it.
        mean_over: the device axis, or axes, to average the product over.
    """
    check_mode(mode)
    linearize = lambda objective, params, key: linearized_gauss_newton(
        objective, params, mode=mode, precision=precision
    )
    return _matvec("gauss_newton_matvec", linearize, fraction, mean_over)


@injectable
def fisher_matvec(
    *, samples: int | None = None, key: jax.Array | int = 0, mode: str = "auto",
    fraction: float = 1.0, precision: Any = "highest", mean_over: AxisNames = None,
) -> Stage:  # fmt: skip
    """The product with the Fisher matrix, F = mean of E_y[∇log r(y|z) ∇log r(y|z)ᵀ].

    It needs an `Objective` with `model=` and a likelihood. Martens, arXiv:1412.1193, section 5,
    eq. 3. The rest as in `hessian_matvec`.

    Args:
        samples: labels drawn from the model per site; None for the exact expectation.
        key: a typed key or a seed, for the labels.
        mode: of the product, as in `ggnvp`.
        fraction: of the batch (its first part) that is used for curvature.
        precision: of matrix products within it.
        mean_over: the device axis, or axes, to average the product over.
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
    *, mode: str = "auto", fraction: float = 1.0, precision: Any = "highest",
    mean_over: AxisNames = None,
) -> Stage:  # fmt: skip
    """The product with the empirical Fisher matrix, F̄ = mean of gₙ gₙᵀ over the examples.

    From the labels of the data, uncentred: no substitute for F far from a good fit. It needs an
    `Objective` with a batch. Martens, arXiv:1412.1193, section 11. The rest as in
    `hessian_matvec`.

    Args:
        mode: of the product, as in `empirical_fvp`.
        fraction: of the batch (its first part) that is used for curvature.
        precision: of matrix products within it.
        mean_over: the device axis, or axes, to average the product over.
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
    key: jax.Array | int | None = None,
) -> Stage:
    """A stage of such a product; `key` is None where nothing is drawn, and then nothing is kept."""
    check_fraction(fraction, name)
    drawing = None if key is None else DrawingKey(key)

    def init(params: Tree) -> DrawState | optax.EmptyState:
        trees.require_floating(params, name)
        if drawing is None:
            return optax.EmptyState()
        return DrawState(drawing.initial(), jnp.zeros((), jnp.int32))

    def rule(
        signal: Signal, state: Any, params: Tree, *, value_fn: Any = None, **extra: Any
    ) -> tuple[Signal, Any]:
        del extra
        objective = as_objective(value_fn, name, params)
        here, local, over = settled(signal, objective, params, fraction, mean_over, name)
        draw = None
        if drawing is not None:
            draw = jax.random.fold_in(drawing.of(state.key), state.step)
        (loss, gradient), product = linearize(here, params, draw)
        signal = signal._replace(matvec=product.averaged(over, here.batch_weight()))
        if fraction == 1:
            signal = share_gradient(signal, objective, params, loss, gradient, local)
        return signal, state if drawing is None else state._replace(step=state.step + 1)

    return stage(init, rule, name=name)


MATRICES = {
    "hessian": hessian_matvec,
    "gauss_newton": gauss_newton_matvec,
    "fisher": fisher_matvec,
    "empirical_fisher": empirical_fisher_matvec,
}


def exact_diag(
    curvature: str = "hessian", *, mode: str = "auto", mean_over: AxisNames = None
) -> Stage:
    """The exact diagonal of a curvature matrix, from one product per parameter: small models.

    Args:
        curvature: "hessian", "gauss_newton", "fisher" or "empirical_fisher".
        mode: of its products, as in the stage named `<curvature>_matvec`.
        mean_over: the device axis, or axes, to average over; `()` keeps each device's own.

    Returns:
        A stage that sets `diagonal`, in float32 or wider, and needs what the stage named
        `<curvature>_matvec` needs.

    Raises:
        ValueError: no such matrix, or no such mode.
    """
    if curvature not in MATRICES:
        raise ValueError(
            f"`exact_diag` takes `curvature` as one of {', '.join(map(repr, MATRICES))}, and got "
            f"{curvature!r}."
        )
    matvec = MATRICES[curvature](mode=mode, mean_over=mean_over)

    def rule(signal: Signal, state: Any, params: Tree, **extra: Any) -> tuple[Signal, Any]:
        inner, state = matvec.update(signal, state, params, **extra)
        diagonal = exact_diagonal(inner.matvec, params)
        return inner._replace(diagonal=diagonal, matvec=signal.matvec), state

    return containing(matvec.init, rule, matvec)
