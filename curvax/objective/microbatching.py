"""Means over contiguous pieces of a batch, by a scan or by `vmap`, accumulated in float32."""

import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from curvax.arithmetic.trees import Tree, is_float, is_overwritten, names, ratio, wide_dtype, widen
from curvax.devices import axes, meshes

KINDS = ("mean", "sum", "max", "min", "last", "concat")
"""Reductions of the values of pieces to a value of the whole batch."""


@jax.tree_util.register_pytree_node_class
class Parts:
    """Values of a piece, the reduction of each over all pieces, and a function of the results.

    A reduction is one of `KINDS`, or "concat 1" to concatenate along axis 1.
    """

    def __init__(
        self, values: list[jax.Array], kinds: tuple[str, ...], finish: Callable[[list[Any]], Tree]
    ):
        self.values, self.kinds, self.finish = values, kinds, finish

    def tree_flatten(self) -> Any:
        return self.values, (self.kinds, self.finish)

    @classmethod
    def tree_unflatten(cls, static: Any, values: Any) -> "Parts":
        return cls(list(values), *static)


def kinds_of(tree: Tree) -> list[str]:
    """The reduction of each leaf.

    `Parts` name theirs. States that are overwritten by their gradients take the maximum, other
    floating leaves the mean, and everything else the last value.
    """

    def own(path: Any, x: Any) -> tuple[str, ...]:
        if isinstance(x, Parts):
            return x.kinds
        if not is_float(x):
            return ("last",)
        return ("max" if is_overwritten(names(path)) else "mean",)

    nodes = jax.tree.leaves_with_path(tree, is_leaf=lambda x: isinstance(x, Parts))
    return [kind for path, x in nodes for kind in own(path, x)]


def finished(tree: Tree) -> Tree:
    """The tree with `Parts`, reduced before, replaced by the function of their values."""
    is_parts = lambda x: isinstance(x, Parts)
    make = lambda x: x.finish(x.values) if is_parts(x) else x
    return jax.tree.map(make, tree, is_leaf=is_parts)


def reduced(kind: str, x: jax.Array) -> jax.Array:
    """Reduces stacked values [count, ...] of all pieces, by any reduction but the mean."""
    if kind == "last":
        return meshes.laid_out(x, ())[-1]
    if kind in ("sum", "max", "min"):
        reduction: Any = {"sum": jnp.sum, "max": jnp.max, "min": jnp.min}[kind]
        return reduction(x, axis=0).astype(x.dtype)
    axis = int(kind.removeprefix("concat") or 0)
    if axis == 0:
        return meshes.joined(x)
    x = jnp.moveaxis(meshes.gathered(x), 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def check_divides(size: int, piece: int, where: str) -> None:
    """Checks that the size of a piece divides the batch.

    Raises:
        ValueError: `piece` is not a positive divisor of `size`.
    """
    if not isinstance(piece, numbers.Integral) or piece < 1 or size % piece:
        divisors = [n for n in range(1, size + 1) if size % n == 0]
        raise ValueError(
            f"{where} divides the batch into equal pieces, and {piece!r} does not divide its "
            f"{size} examples: the remainder would be lost or miscounted. Use one of {divisors}, "
            "or drop the last, shorter batch of an epoch."
        )


def split(batch: Tree, size: int, piece: int, where: str) -> Tree:
    """Reshapes leaves [size, ...] into contiguous pieces [size/piece, piece, ...].

    On an explicit mesh whole pieces stay on their devices if the devices divide their number.
    """
    check_divides(size, piece, where)
    return jax.tree.map(lambda x: meshes.cut(x, size // piece, piece), batch)


def mean_over_scan(
    f: Callable[..., tuple[Tree, jax.Array | None]], pieces: Tree, count: int, *shared: Tree
) -> Tree:
    """The weighted mean of a function over pieces, with one piece in memory at a time.

    On an explicit mesh every device works on its part of each piece. Floating leaves are averaged
    in float32 or wider and returned in their own dtype; other leaves are those of the last piece,
    except in `Parts`.

    Args:
        f: `f(i, piece, *shared) -> (tree, weight or None)`.
        pieces: a tree with leaves [count, ...].
        count: the number of pieces.
        shared: trees passed to every call, the parameters for example.
    """
    number, arranged = jnp.arange(count), meshes.arranged(pieces, meshes.within(pieces))
    first = jax.tree.map(lambda x: x[0], (number, arranged))
    shapes, weighted = _with_sharding_errors(lambda: jax.eval_shape(f, *first, *shared), pieces)
    leaves, treedef = jax.tree.flatten(shapes)
    kinds = kinds_of(shapes)
    floats = [kind == "mean" for kind in kinds]

    def body(carry: Any, piece: Any) -> Any:
        sums, weight = carry
        out, w = f(*piece, *shared)
        w = jnp.ones((), jnp.float32) if w is None else w
        x = jax.tree.leaves(out)
        sums = [s + weighed(w, y).astype(s.dtype) for s, y in zip(sums, _where(x, floats, True))]
        return (sums, weight + w), _where(x, floats, False)

    start = [_zeros(leaf, leaf, weighted) for leaf in _where(leaves, floats, True)]
    weight = meshes.zeros((), jnp.float32, None) if weighted is None else _zeros(weighted, weighted)
    (sums, weight), others = lax.scan(body, (start, weight), (number, arranged))
    means = iter(
        ratio(s, weight).astype(leaf.dtype) for s, leaf in zip(sums, _where(leaves, floats, True))
    )
    stacked = iter(others)
    return jax.tree.unflatten(
        treedef,
        [next(means) if kind == "mean" else reduced(kind, next(stacked)) for kind in kinds],
    )


def _where(leaves: list[Any], flags: list[bool], value: bool) -> list[Any]:
    return [leaf for leaf, flag in zip(leaves, flags) if flag is value]


def _zeros(leaf: jax.ShapeDtypeStruct, *like: jax.ShapeDtypeStruct | None) -> jax.Array:
    """Zeros to accumulate `leaf` in, varying over the device axes of all of `like`."""
    zeros = meshes.zeros(leaf.shape, wide_dtype(leaf.dtype), leaf)
    return axes.vary(zeros, frozenset().union(*map(axes.varying_of, like)))


def mean_over_vmap(
    f: Callable[..., tuple[Tree, jax.Array | None]], pieces: Tree, count: int, *shared: Tree
) -> Tree:
    """Like `mean_over_scan` with all pieces in parallel, in the memory of all of them."""
    out, weight = stack_over_vmap(f, pieces, count, *shared)

    def mean(kind: str, x: jax.Array) -> jax.Array:
        if kind != "mean":
            return reduced(kind, x)
        if weight is None:
            return jnp.mean(widen(x), axis=0).astype(x.dtype)
        w = lax.expand_dims(ratio(weight, jnp.sum(weight)), range(1, x.ndim))
        return jnp.sum(weighed(w, x), axis=0).astype(x.dtype)

    leaves, treedef = jax.tree.flatten(out)
    return jax.tree.unflatten(treedef, map(mean, kinds_of(out), leaves))


def stack_over_vmap(
    f: Callable[..., tuple[Tree, jax.Array | None]], pieces: Tree, count: int, *shared: Tree
) -> tuple[Tree, jax.Array | None]:
    """Applies a function to all pieces in parallel; results are stacked along a new first axis.

    On an explicit mesh a piece that lies on one device is evaluated there, and `shared` is gathered
    if it is sharded along the same axes. If the function names those axes itself, every device
    evaluates its part of each piece instead.

    Args:
        f: `f(i, piece, *shared) -> (tree, weight or None)`.
        pieces: a tree with leaves [count, ...].
        count: the number of pieces.
        shared: trees passed to every call.
    """
    over = (0, 0, *[None] * len(shared))

    def stacked(lie: tuple[meshes.Axes, meshes.Axes]) -> Any:
        own = meshes.arranged(pieces, lie)
        number = meshes.placed(jnp.arange(count), lie[0], own)
        return jax.vmap(f, over)(number, own, *meshes.gathered(shared, lie[0]))

    apart, within = meshes.lie_along(pieces), meshes.within(pieces)
    if apart == within:
        return _with_sharding_errors(lambda: stacked(apart), pieces)
    try:
        return stacked(apart)
    except Exception as error:
        if not meshes.is_about_layouts(error):
            raise
        return _with_sharding_errors(lambda: stacked(within), pieces)


def map_over(f: Callable[..., Tree], pieces: Tree, count: int, chunk: int, *shared: Tree) -> Tree:
    """`f(i, piece, *shared)` of all pieces, stacked along a new first axis, `chunk` at a time."""
    if chunk >= count:
        return stack_over_vmap(lambda *args: (f(*args), None), pieces, count, *shared)[0]
    own = (jnp.arange(count), meshes.arranged(pieces, meshes.within(pieces)))
    batch_size = None if chunk == 1 else chunk
    return _with_sharding_errors(
        lambda: lax.map(lambda piece: f(*piece, *shared), own, batch_size=batch_size), pieces
    )


def _with_sharding_errors(evaluate: Callable[[], Any], pieces: Tree) -> Any:
    """Evaluates a function of the pieces, and explains JAX's errors about sharding.

    Raises:
        ValueError: on an explicit mesh the function names an axis that cannot split the pieces.
    """
    names = meshes.lie_along(pieces)
    try:
        return evaluate()
    except Exception as error:
        if not any(names) or not meshes.is_about_layouts(error):
            raise
        x = jax.tree.leaves(pieces)[0]
        split = sorted({*names[0], *names[1]})
        like = meshes.split_leaf(pieces)
        devices = 1 if like is None else meshes.size_of(tuple(split), like)
        raise ValueError(
            f"The batch lies along {split} of an explicit mesh and is divided into {x.shape[0]} "
            f"pieces of {x.shape[1]} (groups, examples or micro-batches), which the model or the "
            "loss does not accept, probably because it names an axis itself: "
            f"{meshes.first_line(error)} In the model, read the axes of the batch from the type of "
            "its input, `out_sharding=P(jax.typeof(x).sharding.spec[0], None)`: a piece on one "
            f"device has none. Or use pieces that are a multiple of {devices} examples, so that "
            "each is split along those axes."
        ) from error


def weighed(weight: jax.Array, x: jax.Array) -> jax.Array:
    """weight·x in float32 or wider, and 0 if the weight is 0, even if x is NaN."""
    return jnp.where(weight == 0, 0, weight * widen(x))
