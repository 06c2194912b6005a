"""Parameters ↦ the directions along which it is worth looking: random, of a trajectory, of a block.

A direction is a tree like the parameters; several are stacked along a new first axis.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.analysis.curvature_products import Curvature, Matvec, matrix
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.linalg import bases, gaussian_probe
from curvax.linalg.probes import as_key
from curvax.linear_operator import as_product
from curvax.objective import Objective


class Trajectory(NamedTuple):
    """The plane (or line) that explains most of a path through parameter space."""

    directions: Tree
    """Orthonormal, the most explanatory first, stacked [k, ...]."""
    coordinates: jax.Array
    """Where each point of the path lies in them, seen from the last one, [T, k]."""
    explained: jax.Array
    """The share of the path's variance along each direction, [k]."""


def random_directions(params: Tree, k: int = 2, *, key: jax.Array | int = 0) -> Tree:
    """k Gaussian directions, stacked along a new first axis [k, ...], in float32 or wider.

    Args:
        params: the parameters.
        k: directions.
        key: a typed key or a seed.

    Raises:
        TypeError, ValueError: k is no positive integer; the parameters are complex.
    """
    checks.refuse_complex(params, "random_directions")
    checks.check_count("random_directions", k=k)
    return _gaussian(jax.random.split(as_key(key), k), params)


@jax.jit
def _gaussian(keys: jax.Array, params: Tree) -> Tree:
    wide = trees.wide(params)
    return jax.vmap(lambda key: gaussian_probe(key, wide))(keys)


def trajectory_directions(path: Sequence[Tree], k: int = 2) -> Trajectory:
    """The principal components of a training run, for a landscape around its end.

        the leading right singular vectors of [θ₀ - θ̄; …; θ_T - θ̄]

    Li et al., arXiv:1712.09913, section 7.2. It costs T²/2 inner products of parameters and no
    matrix of their size.

    Args:
        path: the parameters at T >= 2 points of the run, such as its checkpoints.
        k: directions, at most T - 1.

    Returns:
        A `Trajectory`.

    Raises:
        ValueError: k is not within 1 and T - 1.
        TypeError: the parameters are complex.
    """
    checks.refuse_complex(list(path), "trajectory_directions")
    checks.check_count("trajectory_directions", k=k)
    if k >= len(path):
        raise ValueError(
            f"A path of {len(path)} points spans {max(0, len(path) - 1)} directions at most, and "
            f"`trajectory_directions` was asked for {k}. Keep more checkpoints, or ask for fewer."
        )
    return _principal(jax.tree.map(lambda *x: jnp.stack([trees.widen(y) for y in x]), *path), k=k)


def of_block(
    mask: Tree, curvature: Curvature = "hessian", *, mode: str = "auto"
) -> Callable[[Objective, Tree], Matvec]:
    """The diagonal block of a curvature, for `top_eigenpairs(curvature=)`: v ↦ m ⊙ C (m ⊙ v).

    Its eigenvectors are directions within the block, as in Yao et al., AdaHessian,
    arXiv:2006.00719, Fig. 2.

    Args:
        mask: of the block, one of `block_masks(params, blocks)`.
        curvature, mode: as in `top_eigenpairs`.
    """
    within = lambda v: jax.tree.map(lambda m, x: (m * x).astype(x.dtype), mask, v)
    of = matrix(curvature, None, "of_block", mode)
    product = lambda objective, params: as_product(of.product(objective, params))
    return lambda objective, params: product(objective, params).within(within, within)


def stack_of(directions: Any, params: Tree, where: str) -> tuple[Tree, int]:
    """Directions, however they were given, stacked [k, ...] in float32 or wider, and k.

    Args:
        directions: a tree like the parameters, such trees stacked [k, ...], or a list of either.
        params: the parameters.
        where: what was called, for its errors.

    Raises:
        ValueError: they are not shaped like the parameters.
    """
    shapes = [jnp.shape(x) for x in jax.tree.leaves(params)]
    whole = _stacked(directions, shapes)
    parts = (
        [whole]
        if whole or not isinstance(directions, list | tuple)
        else [_stacked(one, shapes) for one in directions]
    )
    if not parts or not all(parts):
        found = [jnp.shape(x) for x in jax.tree.leaves(directions)]
        raise ValueError(
            f"`{where}` takes directions shaped like the parameters, {shapes[:3]} …, each a tree "
            f"of {len(shapes)} arrays, or stacked along a new first axis, and got "
            f"{len(found)} arrays {found[:3]} …."
        )
    leaves = [jnp.concatenate(x) for x in zip(*parts)]
    return jax.tree.unflatten(jax.tree.structure(params), leaves), len(leaves[0])


def _stacked(tree: Tree, shapes: list[tuple[int, ...]]) -> list[jax.Array]:
    """The leaves of a tree as [k, *shape] each; none if they have other shapes."""
    leaves = [trees.widen(x) for x in jax.tree.leaves(tree)]
    found = [x.shape for x in leaves]
    if found == shapes:
        return [x[None] for x in leaves]
    return leaves if [s[1:] for s in found] == shapes else []


@functools.partial(jax.jit, static_argnames="k")
def _principal(stack: Tree, *, k: int) -> Trajectory:
    centred = jax.tree.map(lambda x: x - jnp.mean(x, axis=0, keepdims=True), stack)
    gram = jax.vmap(lambda v: bases.coefficients(centred, v))(centred)
    values, vectors = jnp.linalg.eigh(gram)
    values, vectors = values[::-1][:k], vectors[:, ::-1][:, :k]
    lengths = jnp.sqrt(jnp.maximum(values, 0))[:, None]
    directions = bases.combination(trees.ratio(vectors.T, lengths), centred)
    away = jax.tree.map(lambda x: x - x[-1:], stack)
    coordinates = jax.vmap(lambda v: bases.coefficients(directions, v))(away)
    return Trajectory(directions, coordinates, trees.ratio(values, jnp.trace(gram)))
