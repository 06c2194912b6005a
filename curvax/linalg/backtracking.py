"""Iterates of a solver kept at steps that grow by 1.3, and the way back to the best of them.

The model is trusted less the longer it is minimised: an earlier iterate may have a lower loss.
Martens, Deep learning via Hessian-free optimization, ICML 2010, section 4.6.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from curvax.arithmetic.trees import Tree
from curvax.devices import axes

RATIO = 1.3
"""Of successive steps kept."""

Score = Callable[[Tree], jax.Array]


class Kept(NamedTuple):
    """A slot for each step in `kept_steps`: the latest iterate up to that step."""

    x: Tree
    """Leaves [slots, ...], with the dtypes of b."""
    residual: jax.Array
    """‖b - A x‖ / ‖b‖, [slots]."""


def kept_steps(max_steps: int) -> list[int]:
    """⌈1.3ʲ⌉ below `max_steps`, and `max_steps` itself."""
    grown = (math.ceil(RATIO**j) for j in itertools.count())
    return sorted({*itertools.takewhile(lambda step: step < max_steps, grown), max_steps})


def nothing_kept(b: Tree, max_steps: int) -> Kept:
    slots = len(kept_steps(max_steps))
    stack = lambda x: jnp.zeros_like(jnp.broadcast_to(x[None], (slots, *x.shape)))
    return Kept(jax.tree.map(stack, b), jnp.zeros(slots, jnp.result_type(float)))


def keep(kept: Kept, x: Tree, residual: jax.Array, i: jax.Array, max_steps: int) -> Kept:
    """With the iterate of step i in its slot, in place of an earlier one there."""
    slot = _slot(i, max_steps)
    put = lambda stack, new: lax.dynamic_update_index_in_dim(
        stack, new.astype(stack.dtype), slot, axis=0
    )
    return Kept(jax.tree.map(put, kept.x, x), put(kept.residual, residual))


def best(kept: Kept, last: jax.Array, max_steps: int, score: Score) -> tuple[Tree, jax.Array]:
    """(x, its residual): from the iterate of step `last` back as long as the score falls.

    What scores ∞ or no number is passed over. The start is looked at only where no step was.
    """

    def at(slot: jax.Array) -> Kept:
        pick = lambda stack: lax.dynamic_index_in_dim(stack, slot, keepdims=False)
        return jax.tree.map(pick, kept)

    def rank(slot: jax.Array) -> jax.Array:
        value = score(at(slot).x)
        return jnp.where(jnp.isnan(value), jnp.inf, value)

    def before(slot: jax.Array) -> jax.Array:
        return rank(jnp.maximum(slot - 1, 0))

    def back(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple:
        slot, _, ahead = carry
        return slot - 1, ahead, before(slot - 1)

    slot = _slot(last, max_steps)
    start = (slot, rank(slot), before(slot))
    falls = lambda carry: (carry[0] > 0) & ((carry[2] < carry[1]) | jnp.isposinf(carry[1]))
    slot, _, _ = axes.while_loop(falls, back, start)
    return at(slot)


def _slot(i: jax.Array, max_steps: int) -> jax.Array:
    return jnp.searchsorted(jnp.array(kept_steps(max_steps), i.dtype), i)
