"""Complex parameters as pairs of real ones, the loss along with them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from curvax.arithmetic.trees import Tree
from curvax.objective import as_objective
from curvax.pipes.signal import Signal, Stage, containing, pipe


class RealAndImaginary(NamedTuple):
    """What stands in the place of a complex leaf."""

    real: jax.Array
    imaginary: jax.Array


def split_real_and_imaginary(stages: optax.GradientTransformation) -> Stage:
    """The stages on the real and imaginary parts x and y of complex leaves z = x + iy.

    As `optax.contrib.split_real_and_imaginary`, with `value_fn` split too, so that gradients at
    perturbed points, curvature products and diagonals are those of the real problem. Put it
    around the whole method: `split_real_and_imaginary(sam(optax.adamw(1e-3)))`.

    The gradient is taken by Optax's convention, ∂L/∂x + i ∂L/∂y, the conjugate of what `jax.grad`
    gives: `updates, state = tx.update(jax.tree.map(jnp.conj, grads), ...)`. The very gradient that
    `Objective.value_and_grad` returned is known to be JAX's, and is conjugated here. Any other is
    taken as conjugated: put clipping and decay inside, where they are not lost. The updates that
    come out are those to add to the parameters, as `optax.apply_updates` does.

    Args:
        stages: a stage, a pipe, or a plain transformation. Options that are trees fit as prefixes;
            a path ends with `real` or `imaginary` below a complex leaf. Real leaves stay as they
            are.

    Returns:
        A stage; what its stages add to the signal stays inside.
    """
    inner = pipe(stages)

    def rule(signal: Signal, state: Any, params: Tree = None, **extra: Any) -> tuple[Signal, Any]:
        parts, updates = _split(params), signal.updates
        own = given = None
        if extra.get("value_fn") is not None:
            objective = as_objective(extra["value_fn"], "split_real_and_imaginary")
            own = extra["value_fn"] = objective.through(_merge)
            given = objective.cached_gradient(params, updates)
        updates = _split(updates if given is None else jax.tree.map(jnp.conj, updates))
        if given is not None and own is not None:
            own._remember(parts, updates, given.value, given.local)
        inside = signal._replace(
            updates=updates, gradient=updates, diagonal=None, matvec=None, aux=None
        )
        out, state = inner.update(inside, state, parts, **extra)
        merged = jax.tree.map(lambda x, u: x.astype(u.dtype), _merge(out.updates), signal.updates)
        return signal._replace(updates=merged, local=out.local, averaged=out.averaged), state

    return containing(lambda params: inner.init(_split(params)), rule, inner, converted=True)


def _is_pair(x: Any) -> bool:
    return isinstance(x, RealAndImaginary)


def _split(tree: Tree) -> Tree:
    pair = lambda x: RealAndImaginary(x.real, x.imag) if jnp.iscomplexobj(x) else x
    return jax.tree.map(pair, tree)


def _merge(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: lax.complex(*x) if _is_pair(x) else x, tree, is_leaf=_is_pair)
