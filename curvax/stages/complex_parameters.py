"""Complex parameters as pairs of real ones, with the loss converted too."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from curvax.arithmetic.trees import Tree
from curvax.objective import as_objective
from curvax.pipes.signal import Signal, Stage, containing, pipe


class RealAndImaginary(NamedTuple):
    """The pair of real leaves that replaces a complex leaf."""

    real: jax.Array
    imaginary: jax.Array


def split_real_and_imaginary(stages: optax.GradientTransformation) -> Stage:
    """Applies stages to the real and imaginary parts of complex parameters z = x + iy.

    As `optax.contrib.split_real_and_imaginary`, with `value_fn` converted too, so that
    perturbations, curvature products and diagonals are those of the real problem. It goes around
    the whole method: `split_real_and_imaginary(sam(optax.adamw(1e-3)))`.

    The gradient follows Optax's convention, ∂L/∂x + i ∂L/∂y, the conjugate of what `jax.grad`
    returns: `tx.update(jax.tree.map(jnp.conj, grads), ...)`. A gradient that
    `Objective.value_and_grad` returned is recognised, and conjugated here. Clipping and weight
    decay of the gradient belong inside. The updates are to be added to the parameters, as
    `optax.apply_updates` does.

    Args:
        stages: a stage, a pipe, or a plain Optax transformation. Options that are trees are matched
            as prefixes; the path of a complex leaf continues with `real` or `imaginary`. Real
            leaves are unchanged.

    Returns:
        A stage. A diagonal or product of the inner stages does not come out.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, curvax
        >>> loss = lambda z: 0.5 * jnp.sum(jnp.abs(z) ** 2)
        >>> tx = curvax.split_real_and_imaginary(curvax.sam(optax.sgd(1.0), rho=0.1))
        >>> z = jnp.array([3.0 + 4.0j])
        >>> updates, state = tx.update(jnp.conj(jax.grad(loss)(z)), tx.init(z), z, value_fn=loss)
        >>> round(float(updates.real[0]), 2), round(float(updates.imag[0]), 2)
        (-3.06, -4.08)
    """
    inner = pipe(stages)

    def rule(
        signal: Signal, state: optax.OptState, params: Tree = None, **extra: Any
    ) -> tuple[Signal, optax.OptState]:
        parts, updates = _split(params), signal.updates
        own = given = None
        if extra.get("value_fn") is not None:
            objective = as_objective(extra["value_fn"], "split_real_and_imaginary")
            own = extra["value_fn"] = objective.through(_merge)
            given = objective.cached_gradient(params, updates)
        updates = _split(updates if given is None else jax.tree.map(jnp.conj, updates))
        if given is not None and own is not None:
            own.gradients.store(parts, updates, given.value, given.local)
        inside = signal._replace(
            updates=updates, gradient=updates, diagonal=None, matvec=None, factors=None, aux=None
        )
        out, state = inner.update(inside, state, parts, **extra)
        merged = jax.tree.map(lambda x, u: x.astype(u.dtype), _merge(out.updates), signal.updates)
        return signal._replace(updates=merged, local=out.local, averaged=out.averaged), state

    return containing(lambda params: inner.init(_split(params)), rule, inner, converted=True)


def _is_pair(x: object) -> bool:
    return isinstance(x, RealAndImaginary)


def _split(tree: Tree) -> Tree:
    pair = lambda x: RealAndImaginary(x.real, x.imag) if jnp.iscomplexobj(x) else x
    return jax.tree.map(pair, tree)


def _merge(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: lax.complex(*x) if _is_pair(x) else x, tree, is_leaf=_is_pair)
