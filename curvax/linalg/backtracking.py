"""Backtracking over the iterates of a solver, kept at steps that grow by a factor of 1.3.

Minimising the quadratic model further does not always decrease the loss further, so an earlier
iterate may have a lower loss. Martens, Deep learning via Hessian-free optimization, ICML 2010,
section 4.6.
"""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Score
from curvax.devices import axes

RATIO = 1.3
"""Ratio of successive steps whose iterates are kept; Martens 2010, section 4.6."""


class Kept(NamedTuple):
    """One slot for each step in `kept_steps`, with the latest iterate up to that step."""

    x: Tree
    """The iterates, leaves [slots, ...] with the dtypes of b."""
    residual: jax.Array
    """‖b - A x‖ / ‖b‖ of each, [slots]."""


def kept_steps(max_steps: int) -> list[int]:
    """The steps ⌈1.3ʲ⌉ below `max_steps`, and `max_steps`."""
    grown = (math.ceil(RATIO**j) for j in itertools.count())
    return sorted({*itertools.takewhile(lambda step: step < max_steps, grown), max_steps})


def nothing_kept(b: Tree, max_steps: int) -> Kept:
    slots = len(kept_steps(max_steps))
    stack = lambda x: jnp.zeros_like(jnp.broadcast_to(x[None], (slots, *x.shape)))
    return Kept(jax.tree.map(stack, b), jnp.zeros(slots, jnp.result_type(float)))


def keep(kept: Kept, x: Tree, residual: jax.Array, i: jax.Array, max_steps: int) -> Kept:
    """Writes the iterate of step i to its slot, over an earlier one."""
    slot = _slot(i, max_steps)
    put = lambda stack, new: lax.dynamic_update_index_in_dim(
        stack, new.astype(stack.dtype), slot, axis=0
    )
    return Kept(jax.tree.map(put, kept.x, x), put(kept.residual, residual))


def best(kept: Kept, last: jax.Array, max_steps: int, score: Score) -> tuple[Tree, jax.Array]:
    """Goes back from the iterate of step `last` as long as the score decreases.

    Iterates that score ∞ or NaN are skipped. Step 0 is used only if there was no other.

    Returns:
        (x, residual)
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
