"""Parameters ↦ directions for landscapes: random, along a training run, within a block.

A direction is a tree like the parameters; several are stacked along a new first axis.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.analysis.curvature_products import CurvatureLike, matrix
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Key, Matvec
from curvax.linalg import bases, gaussian_probe
from curvax.linalg.probes import as_key
from curvax.linear_operator import as_product
from curvax.objective import Objective


class Trajectory(NamedTuple):
    """Result of `trajectory_directions`: the principal components of a path of parameters."""

    directions: Tree
    """Orthonormal, in order of decreasing variance, stacked [k, ...]."""
    coordinates: jax.Array
    """Coordinates of each point of the path, with its last point as the origin, [T, k]."""
    explained: jax.Array
    """The share of the path's variance along each direction, [k]."""


def random_directions(params: Tree, k: int = 2, *, key: Key = 0) -> Tree:
    """Draws k Gaussian directions.

    Args:
        params: the point, or any tree of such arrays.
        k: number of directions.
        key: typed key or seed.

    Returns:
        Trees like `params`, stacked along a new first axis [k, ...], in float32 or wider.

    Raises:
        TypeError, ValueError: k is not a positive integer, or the parameters are complex.

    Examples:
        >>> import jax.numpy as jnp
        >>> from curvax import analysis
        >>> analysis.random_directions({"w": jnp.ones((3, 4))}, k=2)["w"].shape
        (2, 3, 4)
    """
    checks.refuse_complex(params, "random_directions")
    checks.check_count("random_directions", k=k)
    return _gaussian(jax.random.split(as_key(key), k), params)


@jax.jit
def _gaussian(keys: jax.Array, params: Tree) -> Tree:
    wide = trees.wide(params)
    return jax.vmap(lambda key: gaussian_probe(key, wide))(keys)


def trajectory_directions(path: Sequence[Tree], k: int = 2) -> Trajectory:
    """Computes the principal components of a training run, for a landscape around its end.

        the leading right singular vectors of [θ₁ - θ̄; …; θ_T - θ̄]

    Cost: T²/2 inner products of parameters, in the memory of the T points. Li et al.,
    arXiv:1712.09913, section 7.2.

    Args:
        path: the parameters at T >= 2 points of the run, such as its checkpoints.
        k: number of directions, in 1 ... T - 1.

    Returns:
        A `Trajectory`.

    Raises:
        ValueError: k is out of range.
        TypeError: the parameters are complex.

    Examples:
        >>> import jax.numpy as jnp
        >>> from curvax import analysis
        >>> path = [jnp.array([0.0, 0.0]), jnp.array([3.0, 4.0]), jnp.array([6.0, 8.0])]
        >>> found = analysis.trajectory_directions(path, k=1)
        >>> round(float(found.explained[0]), 3), round(abs(float(found.coordinates[0, 0])), 3)
        (1.0, 10.0)
    """
    checks.refuse_complex(list(path), "trajectory_directions")
    checks.check_count("trajectory_directions", k=k)
    if k >= len(path):
        raise ValueError(
            f"A path of {len(path)} points spans {max(0, len(path) - 1)} directions at most, and "
            f"`trajectory_directions` got k={k}. Pass more checkpoints or a smaller `k`."
        )
    return _principal(jax.tree.map(lambda *x: jnp.stack([trees.widen(y) for y in x]), *path), k=k)


def of_block(
    mask: Tree, curvature: CurvatureLike = "hessian", *, mode: str = "auto"
) -> Callable[[Objective, Tree], Matvec]:
    """Restricts a curvature matrix to one diagonal block, for `top_eigenpairs(curvature=)`.

        v ↦ m ⊙ C (m ⊙ v)

    Its eigenvectors with λ ≠ 0 are directions within the block. Yao et al., AdaHessian,
    arXiv:2006.00719, Fig. 2.

    Args:
        mask: m, one of `block_masks(params, blocks)`.
        curvature, mode: as in `top_eigenpairs`.

    Returns:
        A callable `(objective, params) -> product`.

    Raises:
        ValueError: an unknown curvature or mode.

    Examples:
        >>> import jax.numpy as jnp
        >>> from curvax import analysis
        >>> loss = lambda p: jnp.sum(p["a"] ** 2) + 3 * jnp.sum(p["b"] ** 2)
        >>> params = {"a": jnp.ones(2), "b": jnp.ones(2)}
        >>> block = analysis.of_block(analysis.block_masks(params, "*")["a"])
        >>> round(float(analysis.top_eigenpairs(loss, params, curvature=block).values[0]), 3)
        2.0
    """
    within = lambda v: jax.tree.map(lambda m, x: (m * x).astype(x.dtype), mask, v)
    of = matrix(curvature, None, "of_block", mode)
    product = lambda objective, params: as_product(of.product(objective, params))
    return lambda objective, params: product(objective, params).within(within, within)


def stack_of(directions: Tree, params: Tree, where: str) -> tuple[Tree, int]:
    """Stacks directions to [k, ...] in float32 or wider, and returns them with k.

    Args:
        directions: a tree like the parameters, such trees stacked [k, ...], or a list of either.
        params: the parameters.
        where: the public function, for error messages.

    Raises:
        ValueError: a direction is not shaped like the parameters.
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
            f"{len(found)} arrays {found[:3]} …. Pass trees with the structure of `params`."
        )
    leaves = [jnp.concatenate(x) for x in zip(*parts)]
    return jax.tree.unflatten(jax.tree.structure(params), leaves), len(leaves[0])


def _stacked(tree: Tree, shapes: list[tuple[int, ...]]) -> list[jax.Array]:
    """The leaves of a tree as [k, *shape] each; an empty list for other shapes."""
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
