"""Sharding of arrays on explicit meshes: reading it from types, and resharding.

On a mesh of explicit axes a type says which mesh axes shard each dimension. A reshape, a slice or a
loop whose output sharding JAX cannot infer is given one here. On other arrays these functions
change nothing.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from curvax.arithmetic.trees import Tree, is_sharded

Axes = tuple[str, ...]


def split_of(x: jax.Array, dim: int = 0) -> Axes:
    """The mesh axes that shard a dimension, slowest first."""
    spec = jax.typeof(x).sharding.spec
    entry = spec[dim] if dim < len(spec) else None
    if isinstance(entry, str):
        return (entry,)
    return tuple(entry) if isinstance(entry, tuple) else ()


def leading(tree: Tree) -> Axes:
    """The mesh axes that shard the first dimension of the leaves."""
    return next(filter(None, map(split_of, jax.tree.leaves(tree))), ())


def size_of(names: Axes, x: jax.Array) -> int:
    """The number of shards along these axes of the mesh of x."""
    shape = jax.typeof(x).sharding.mesh.shape
    return math.prod(shape[name] for name in names)


def fitting(names: Axes, x: jax.Array, size: int) -> Axes:
    """Those of the axes that divide a dimension of `size` evenly, slowest first."""
    found: Axes = ()
    for name in names:
        if size % size_of((*found, name), x) == 0:
            found = (*found, name)
    return found


def layout(x: jax.Array, dims: Iterable[Axes]) -> NamedSharding:
    """A sharding on the mesh of x, from the mesh axes of each dimension."""
    return NamedSharding(_mesh(x), P(*(names or None for names in dims)))


def _mesh(x: jax.Array) -> Any:
    """The mesh of x, from its sharding or, for a tracer, from its type."""
    known = None if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
    return known.mesh if isinstance(known, NamedSharding) else jax.typeof(x).sharding.mesh


def laid_out(x: jax.Array, *first: Axes) -> jax.Array:
    """x with its first dimensions sharded along these axes, and the others unchanged."""
    dims = [split_of(x, dim) for dim in range(x.ndim)]
    wanted = [*first, *dims[len(first) :]]
    return x if wanted == dims else _resharded(x, layout(x, wanted))


def placed(x: jax.Array, names: Axes, pieces: Tree) -> jax.Array:
    """A replicated vector, sharded along axes of the mesh of `pieces`."""
    like = split_leaf(pieces)
    return x if like is None or not names else _resharded(x, layout(like, [names]))


def gathered(tree: Tree, names: Axes | None = None) -> Tree:
    """The tree gathered over the named axes; over all axes if `names` is None."""

    def gather(x: jax.Array) -> jax.Array:
        if not is_sharded(x):
            return x
        kept = lambda dim: tuple(
            a for a in split_of(x, dim) if names is not None and a not in names
        )
        return laid_out(x, *(kept(dim) for dim in range(x.ndim)))

    return tree if names == () else jax.tree.map(gather, tree)


def laid_like(tree: Tree, like: Tree) -> Tree:
    """The same values and dtypes, sharded like `like` where that is sharded."""
    return jax.tree.map(lambda x, y: _like(x, y, ()) if is_sharded(y) else x, tree, like)


def stacked_like(stack: Tree, like: Tree) -> Tree:
    """Trees stacked along a new first axis, each sharded like `like` where that is sharded."""
    return jax.tree.map(lambda x, y: _like(x, y, ((),)) if is_sharded(y) else x, stack, like)


def _like(x: jax.Array, y: jax.Array, first: tuple[Axes, ...]) -> jax.Array:
    return _resharded(x, layout(y, [*first, *(split_of(y, dim) for dim in range(y.ndim))]))


def cut(x: jax.Array, count: int, piece: int) -> jax.Array:
    """Reshapes [n, ...] to contiguous pieces [count, piece, ...].

    Mesh axes that shard n shard `count` if they divide it, so that whole pieces stay on their
    devices. The other axes shard the examples of each piece if they divide those.
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
    """Reshapes [count, piece, ...] to [count·piece, ...], sharded along the axes of both."""
    shape = (x.shape[0] * x.shape[1], *x.shape[2:])
    if not is_sharded(x):
        return x.reshape(shape)
    rest = [split_of(x, dim) for dim in range(2, x.ndim)]
    names = fitting((*split_of(x, 0), *split_of(x, 1)), x, shape[0])
    return lax.reshape(x, shape, out_sharding=layout(x, [names, *rest]))


def by_rows(x: jax.Array) -> jax.Array:
    """x sharded along its first dimension alone, with whole rows on their devices."""
    return laid_out(x, split_of(x), *[()] * (x.ndim - 1))


def rows(x: jax.Array, n: int) -> jax.Array:
    """Reshapes [n, ...] to [n, C], with whole rows on their devices."""
    if is_sharded(x):
        x = by_rows(x)
        return lax.reshape(x, (n, x.size // n), out_sharding=layout(x, [split_of(x), ()]))
    return x.reshape(n, -1)


def first(x: jax.Array, count: int) -> jax.Array:
    """The first `count` rows of [n, ...], sharded along those axes that divide `count`."""
    if not is_sharded(x):
        return x[:count]
    names = fitting(split_of(x), x, count)
    return lax.slice_in_dim(laid_out(x, names), 0, count)


def split_leaf(pieces: Tree) -> jax.Array | None:
    """A leaf of pieces [count, piece, ...] whose first or second dimension is sharded, or None."""
    return next((x for x in jax.tree.leaves(pieces) if split_of(x, 0) or split_of(x, 1)), None)


def lie_along(pieces: Tree) -> tuple[Axes, Axes]:
    """The mesh axes that shard the first and the second dimension of pieces [count, piece, ...]."""
    x = split_leaf(pieces)
    return ((), ()) if x is None else (split_of(x, 0), split_of(x, 1))


def within(pieces: Tree) -> tuple[Axes, Axes]:
    """As `lie_along`, once all axes that divide the second dimension are moved there."""
    x = split_leaf(pieces)
    if x is None:
        return (), ()
    return (), fitting((*split_of(x, 0), *split_of(x, 1)), x, x.shape[1])


def arranged(pieces: Tree, first: tuple[Axes, Axes]) -> Tree:
    """Pieces [count, piece, ...] resharded along these axes in their first two dimensions."""
    whole = split_leaf(pieces)
    if whole is None:
        return pieces

    def place(x: jax.Array) -> jax.Array:
        rest = [split_of(x, dim) for dim in range(2, x.ndim)]
        return _resharded(x, layout(whole, [*first, *rest][: x.ndim]))

    return jax.tree.map(place, pieces)


def is_about_layouts(error: Exception) -> bool:
    """Whether an error is about sharding; some of JAX's error types for it are not public."""
    kinds = ("ShardingTypeError", "DuplicateSpecError")
    return type(error).__name__ in kinds or "harding" in str(error)


def first_line(error: Exception) -> str:
    return str(error).split("\n")[0][:300]


def _resharded(x: jax.Array, wanted: Any) -> jax.Array:
    return jax.sharding.reshard(x, wanted)


def zeros(shape: Any, dtype: Any, like: Any) -> jax.Array:
    """Zeros, sharded like an abstract value of the same shape."""
    made, lies = jnp.zeros(shape, dtype), getattr(like, "sharding", None)
    split = any(entry is not None for entry in getattr(lies, "spec", ()))
    mesh = jax.sharding.get_abstract_mesh()
    if not shape and AxisType.Explicit in (mesh.axis_types or ()):
        # A scalar constant has no mesh, and `vmap` could not broadcast it to one.
        return _resharded(made, NamedSharding(mesh, P()))
    return _resharded(made, lies) if split else made


def in_context(names: Axes) -> Axes:
    """Those of the axes that the mesh of `jax.set_mesh` has, and that no map has bound."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in names if name in mesh.shape and name not in mesh.manual_axes)


def mapped(f: Callable[..., Tree], names: Axes) -> Callable[..., Tree]:
    """f with these axes bound, from equal values to equal values: f itself where they are."""
    if not in_context(names):
        return f
    mapping = jax.shard_map(f, in_specs=P(), out_specs=P(), axis_names=set(names))
    return lambda *trees: mapping(*gathered(trees))


def automatically(f: Callable[..., Tree], *trees: Tree) -> Tree:
    """f(*trees) with the sharding of its operations chosen by the compiler, and results gathered.

    For functions of arrays that are sharded along axes of any dimension, and small results.
    """
    if not any(is_sharded(x) for x in jax.tree.leaves(trees)):
        return f(*trees)
    return jax.sharding.auto_axes(f, out_sharding=P())(*trees)
