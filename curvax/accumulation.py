"""Means over pieces of a batch: split into contiguous pieces, scan, accumulate in float32."""

import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from curvax import axes
from curvax.trees import Tree, is_float, ratio, wide_dtype, widen


def check_divides(size: int, piece: int, where: str) -> None:
    """Refuses a piece that is no positive divisor of the batch.

    Raises:
        ValueError: `piece` does not divide `size`.
    """
    if not isinstance(piece, numbers.Integral) or piece < 1 or size % piece:
        divisors = [n for n in range(1, size + 1) if size % n == 0]
        raise ValueError(
            f"{where} cuts the batch into equal pieces, and {piece!r} does not divide its {size} "
            f"examples: the remainder would be lost or miscounted. Use one of {divisors}, or drop "
            "the last, shorter batch of an epoch."
        )


def split(batch: Tree, size: int, piece: int, where: str) -> Tree:
    """Contiguous pieces: leaves [size, ...] become [size/piece, piece, ...]."""
    check_divides(size, piece, where)
    return jax.tree.map(lambda x: x.reshape(size // piece, piece, *x.shape[1:]), batch)


def mean_over_scan(
    f: Callable[[jax.Array, Tree], tuple[Tree, jax.Array | None]], pieces: Tree, count: int
) -> Tree:
    """The mean of `f(i, piece) -> (tree, weight or None)` over `count` stacked pieces.

    One piece is in memory at a time. Floating leaves are averaged in float32 or wider and come
    back in their own dtype; all other leaves are those of the last piece.
    """
    number = jnp.arange(count)
    first = jax.tree.map(lambda x: x[0], (number, pieces))
    shapes, weighted = jax.eval_shape(f, *first)
    leaves, treedef = jax.tree.flatten(shapes)
    floats = [is_float(leaf) for leaf in leaves]

    def body(carry: Any, piece: Any) -> Any:
        sums, weight = carry
        out, w = f(*piece)
        w = jnp.ones((), jnp.float32) if w is None else w
        x = jax.tree.leaves(out)
        sums = [s + weighed(w, y).astype(s.dtype) for s, y in zip(sums, _where(x, floats, True))]
        return (sums, weight + w), _where(x, floats, False)

    start = [_zeros(leaf, leaf, weighted) for leaf in _where(leaves, floats, True)]
    weight = jnp.zeros((), jnp.float32) if weighted is None else _zeros(weighted, weighted)
    (sums, weight), others = lax.scan(body, (start, weight), (number, pieces))
    means = iter(
        ratio(s, weight).astype(leaf.dtype) for s, leaf in zip(sums, _where(leaves, floats, True))
    )
    last = iter(x[-1] for x in others)
    return jax.tree.unflatten(
        treedef, [next(means) if is_mean else next(last) for is_mean in floats]
    )


def _where(leaves: list[Any], flags: list[bool], value: bool) -> list[Any]:
    return [leaf for leaf, flag in zip(leaves, flags) if flag is value]


def _zeros(leaf: jax.ShapeDtypeStruct, *like: jax.ShapeDtypeStruct | None) -> jax.Array:
    """Zeros to add leaves to, varying over the axes of all that they are made `like`."""
    zeros = jnp.zeros(leaf.shape, wide_dtype(leaf.dtype))
    return axes.vary(zeros, frozenset().union(*map(axes.varying_of, like)))


def mean_over_vmap(
    f: Callable[[jax.Array, Tree], tuple[Tree, jax.Array | None]], pieces: Tree, count: int
) -> Tree:
    """The same mean with all pieces at once: parallel, and aligned with a sharded batch."""
    leading = _leading(pieces)
    out, weight = stack_over_vmap(f, pieces, count)

    def mean(x: jax.Array) -> jax.Array:
        if not is_float(x):
            return (x if leading is None else jax.sharding.reshard(x, P()))[-1]
        if weight is None:
            return jnp.mean(widen(x), axis=0).astype(x.dtype)
        w = ratio(weight, jnp.sum(weight)).reshape(count, *[1] * (x.ndim - 1))
        return jnp.sum(weighed(w, x), axis=0).astype(x.dtype)

    return jax.tree.map(mean, out)


def stack_over_vmap(
    f: Callable[[jax.Array, Tree], tuple[Tree, jax.Array | None]], pieces: Tree, count: int
) -> tuple[Tree, jax.Array | None]:
    """`f(i, piece)` of all pieces at once, stacked along a new first axis."""
    number, leading = jnp.arange(count), _leading(pieces)
    if leading is not None:
        number = jax.sharding.reshard(number, P(leading))
    return jax.vmap(f)(number, pieces)


def _leading(pieces: Tree) -> Any:
    """The mesh axis that the pieces lie along, where types tell (explicit meshes)."""
    specs = [jax.typeof(x).sharding.spec for x in jax.tree.leaves(pieces)]
    return next((spec[0] for spec in specs if len(spec)), None)


def weighed(weight: jax.Array, x: jax.Array) -> jax.Array:
    """weight·x, and 0 where the weight is: what counts for nothing may be NaN."""
    return jnp.where(weight == 0, 0, weight * widen(x))
