"""Where arrays of explicit meshes lie, and the same values laid out otherwise.

A type then says along which axes of the mesh each dimension is split, and a reshape, a slice or a
loop that has no one layout to come out in is told one here. Without such a mesh all is as it was.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from curvax.arithmetic.trees import Tree, is_sharded

Axes = tuple[str, ...]


def split_of(x: jax.Array, dim: int = 0) -> Axes:
    """The mesh axes along which a dimension is split, slowest first."""
    spec = jax.typeof(x).sharding.spec
    entry = spec[dim] if dim < len(spec) else None
    if isinstance(entry, str):
        return (entry,)
    return tuple(entry) if isinstance(entry, tuple) else ()


def leading(tree: Tree) -> Axes:
    """The mesh axes along which the first dimension of the leaves is split."""
    return next(filter(None, map(split_of, jax.tree.leaves(tree))), ())


def size_of(names: Axes, x: jax.Array) -> int:
    """The parts that these axes of the mesh of x make."""
    shape = jax.typeof(x).sharding.mesh.shape
    return math.prod(shape[name] for name in names)


def fitting(names: Axes, x: jax.Array, size: int) -> Axes:
    """Those of the axes that split a dimension of `size` evenly, the slowest first."""
    found: Axes = ()
    for name in names:
        if size % size_of((*found, name), x) == 0:
            found = (*found, name)
    return found


def layout(x: jax.Array, dims: Iterable[Axes]) -> NamedSharding:
    """A layout on the mesh of x, from the axes of each dimension."""
    return NamedSharding(_mesh(x), P(*(names or None for names in dims)))


def _mesh(x: jax.Array) -> Any:
    """The mesh of x: of an array that has none but a type, that of its type."""
    known = None if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
    return known.mesh if isinstance(known, NamedSharding) else jax.typeof(x).sharding.mesh


def laid_out(x: jax.Array, *first: Axes) -> jax.Array:
    """x with its first dimensions split along these axes, the others as they are."""
    dims = [split_of(x, dim) for dim in range(x.ndim)]
    wanted = [*first, *dims[len(first) :]]
    return x if wanted == dims else _resharded(x, layout(x, wanted))


def placed(x: jax.Array, names: Axes, pieces: Tree) -> jax.Array:
    """A vector, of no mesh as yet, split along axes of the mesh of pieces."""
    like = split_leaf(pieces)
    return x if like is None or not names else _resharded(x, layout(like, [names]))


def gathered(tree: Tree, names: Axes | None = None) -> Tree:
    """The same tree, split along none of these axes; along none at all where they are None."""

    def gather(x: jax.Array) -> jax.Array:
        if not is_sharded(x):
            return x
        kept = lambda dim: tuple(
            a for a in split_of(x, dim) if names is not None and a not in names
        )
        return laid_out(x, *(kept(dim) for dim in range(x.ndim)))

    return tree if names == () else jax.tree.map(gather, tree)


def laid_like(tree: Tree, like: Tree) -> Tree:
    """The same values and dtypes, laid out like `like` where that is split."""
    return jax.tree.map(lambda x, y: _like(x, y, ()) if is_sharded(y) else x, tree, like)


def stacked_like(stack: Tree, like: Tree) -> Tree:
    """Trees stacked along a new first axis, each laid out like `like` where that is split."""
    return jax.tree.map(lambda x, y: _like(x, y, ((),)) if is_sharded(y) else x, stack, like)


def _like(x: jax.Array, y: jax.Array, first: tuple[Axes, ...]) -> jax.Array:
    return _resharded(x, layout(y, [*first, *(split_of(y, dim) for dim in range(y.ndim))]))


def cut(x: jax.Array, count: int, piece: int) -> jax.Array:
    """[n, ...] as [count, piece, ...], contiguous.

    Of the axes that split n those that can split `count`, so that whole pieces stay on their
    devices where they do; the others split the examples of each piece, where those come out even.
    """
    shape = (count, piece, *x.shape[1:])
    names = split_of(x)
    if not names:
        return x.reshape(shape)
    outer = fitting(names, x, count)
    inner = fitting(tuple(name for name in names if name not in outer), x, piece)
    rest = [split_of(x, dim) for dim in range(1, x.ndim)]
    return lax.reshape(x, shape, out_sharding=layout(x, [outer, inner, *rest]))


def joined(x: jax.Array) -> jax.Array:
    """[count, piece, ...] as [count·piece, ...], split along all axes that split either."""
    shape = (x.shape[0] * x.shape[1], *x.shape[2:])
    if not is_sharded(x):
        return x.reshape(shape)
    rest = [split_of(x, dim) for dim in range(2, x.ndim)]
    names = fitting((*split_of(x, 0), *split_of(x, 1)), x, shape[0])
    return lax.reshape(x, shape, out_sharding=layout(x, [names, *rest]))


def by_rows(x: jax.Array) -> jax.Array:
    """x with whole rows on their devices."""
    return laid_out(x, split_of(x), *[()] * (x.ndim - 1))


def rows(x: jax.Array, n: int) -> jax.Array:
    """[n, ...] as [n, C], with whole rows on their devices."""
    if is_sharded(x):
        x = by_rows(x)
        return lax.reshape(x, (n, x.size // n), out_sharding=layout(x, [split_of(x), ()]))
    return x.reshape(n, -1)


def first(x: jax.Array, count: int) -> jax.Array:
    """The first `count` of [n, ...], split as far as they come out even."""
    if not is_sharded(x):
        return x[:count]
    names = fitting(split_of(x), x, count)
    return lax.slice_in_dim(laid_out(x, names), 0, count)


def split_leaf(pieces: Tree) -> jax.Array | None:
    """A leaf of pieces [count, piece, ...] whose first or second dimension is split."""
    return next((x for x in jax.tree.leaves(pieces) if split_of(x, 0) or split_of(x, 1)), None)


def lie_along(pieces: Tree) -> tuple[Axes, Axes]:
    """The mesh axes that split the first two dimensions of pieces [count, piece, ...]."""
    x = split_leaf(pieces)
    return ((), ()) if x is None else (split_of(x, 0), split_of(x, 1))


def within(pieces: Tree) -> tuple[Axes, Axes]:
    """The same where those axes split the examples of each piece alone, as far as they can."""
    x = split_leaf(pieces)
    if x is None:
        return (), ()
    return (), fitting((*split_of(x, 0), *split_of(x, 1)), x, x.shape[1])


def arranged(pieces: Tree, first: tuple[Axes, Axes]) -> Tree:
    """Pieces [count, piece, ...] whose first two dimensions are split along these axes."""
    whole = split_leaf(pieces)
    if whole is None:
        return pieces

    def place(x: jax.Array) -> jax.Array:
        rest = [split_of(x, dim) for dim in range(2, x.ndim)]
        return _resharded(x, layout(whole, [*first, *rest][: x.ndim]))

    return jax.tree.map(place, pieces)


def is_about_layouts(error: Exception) -> bool:
    """Whether JAX refused a layout (of its types of errors some are not public)."""
    kinds = ("ShardingTypeError", "DuplicateSpecError")
    return type(error).__name__ in kinds or "harding" in str(error)


def first_line(error: Exception) -> str:
    return str(error).split("\n")[0][:300]


def _resharded(x: jax.Array, wanted: Any) -> jax.Array:
    return jax.sharding.reshard(x, wanted)


def zeros(shape: Any, dtype: Any, like: Any) -> jax.Array:
    """Zeros laid out like an abstract value of that shape."""
    made, lies = jnp.zeros(shape, dtype), getattr(like, "sharding", None)
    split = any(entry is not None for entry in getattr(lies, "spec", ()))
    mesh = jax.sharding.get_abstract_mesh()
    if not shape and AxisType.Explicit in (mesh.axis_types or ()):
        # A scalar is a constant of no mesh, which `vmap` cannot spread over one.
        return _resharded(made, NamedSharding(mesh, P()))
    return _resharded(made, lies) if split else made
