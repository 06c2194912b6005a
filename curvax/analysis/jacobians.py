"""A model and a point ↦ the Jacobian of its outputs, for each example or as two linear maps."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.curvature.gauss_newton import model_pass
from curvax.curvature.linearization import localized, refuse_complex_values
from curvax.devices import meshes
from curvax.objective import Objective, map_examples, microbatching

NUMBERS = 2**26
"""Default limit on the entries of a Jacobian in memory: 256 MB in float32."""


class Maps(NamedTuple):
    """J, the Jacobian of all outputs with respect to the parameters, and its transpose."""

    push: Callable[[Tree], jax.Array]
    """v ↦ J v, [n, C]."""
    pull: Callable[[jax.Array], Tree]
    """u ↦ Jᵀ u for u [n, C], in float32 or wider."""


def outputs_of(objective: Objective, params: Tree) -> jax.Array:
    """The outputs z of the batch, [n, C]: one row for each example."""
    outputs = objective.outputs(params)[0]
    refuse_complex_values(outputs)
    return rows(outputs, objective.size)


def outputs_alone(objective: Objective, params: Tree) -> jax.Array:
    """The outputs of each example evaluated as a batch of one, [n, C]."""
    return map_examples(objective, lambda one, params: outputs_of(one, params)[0], params)[0]


def outputs_shape(objective: Objective, params: Tree) -> tuple[int, int]:
    """(n, C), by abstract evaluation."""
    n, outputs = jax.eval_shape(lambda p: outputs_of(objective, p), params).shape
    return n, outputs


def rows(outputs: Tree, n: int) -> jax.Array:
    """A tree of arrays [n, ...] as one array [n, C]."""
    leaves = [meshes.rows(x, n) for x in jax.tree.leaves(outputs)]
    return jnp.concatenate(leaves, axis=1)


def jacobian(objective: Objective, params: Tree) -> Tree:
    """∂z/∂θ with each example as a batch of one: a tree like `params`, leaves [n, C, ...]."""
    params, _ = localized(objective, params)
    one = lambda example, params: jax.jacrev(lambda p: outputs_of(example, p)[0])(params)
    return map_examples(objective, one, params)[0]


def fitting_chunk(objective: Objective, params: Tree) -> int:
    """The largest divisor of the batch size whose Jacobian has at most `NUMBERS` entries."""
    each = outputs_shape(objective, params)[1] * sum(x.size for x in jax.tree.leaves(params))
    fit = [d for d in range(1, objective.size + 1) if objective.size % d == 0]
    return max((d for d in fit if d * each <= NUMBERS), default=1)


def linear_maps(objective: Objective, params: Tree, chunk: int | None) -> Maps:
    """J and Jᵀ: linearised once, or anew at each application in chunks of examples."""
    n = objective.size
    if chunk is None or chunk == n:
        return _linearized(objective, params)
    groups = objective.groups(chunk)
    part = lambda i, batch: _linearized(objective.piece(batch, i, n // chunk), params)

    def push(v: Tree) -> jax.Array:
        one = lambda i, batch, v: part(i, batch).push(v)
        found = microbatching.map_over(one, groups, n // chunk, 1, v)
        return meshes.joined(found)

    def pull(u: jax.Array) -> Tree:
        cut = meshes.cut(u, n // chunk, chunk)
        one = lambda i, piece: (part(i, piece[0]).pull(piece[1]), None)
        mean = microbatching.mean_over_scan(one, (groups, cut), n // chunk)
        return trees.scale(n // chunk, mean)

    return Maps(push, pull)


def _linearized(objective: Objective, params: Tree) -> Maps:
    whole = model_pass(objective, params)
    n = objective.size

    def pull(u: jax.Array) -> Tree:
        return trees.wide(whole.pull(_like(u, whole.outputs)))

    return Maps(lambda v: rows(whole.model.push(v), n), pull)


def _like(u: jax.Array, outputs: Tree) -> Tree:
    """Splits rows [n, C] into a tree like the outputs, the inverse of `rows`."""
    leaves, treedef = jax.tree.flatten(outputs)
    ends = [0]
    for x in leaves:
        ends.append(ends[-1] + x.size // len(x))
    cut = [lax.slice_in_dim(u, a, b, axis=1) for a, b in itertools.pairwise(ends)]
    shaped = [part.reshape(x.shape) for part, x in zip(cut, leaves)]
    return jax.tree.unflatten(treedef, trees.laid_out_like(shaped, leaves))
