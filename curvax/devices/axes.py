"""Named device axes: which are bound, over which a value varies, and the mean over them.

One code path serves pmap, shard_map (check_vma on and off), vmap with an axis name, and jit
without any: a value that is not yet known to vary over an axis is cast, what is bound is averaged,
what is not bound is left alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from curvax import compat
from curvax.arithmetic.trees import (
    Path,
    Tree,
    is_float,
    is_overwritten,
    map_with_path,
    ratio,
    widen,
)

AxisNames = str | tuple[str, ...] | None


class Neighbours(NamedTuple):
    """Each `size` devices in a row along an axis, where no axis of a mesh holds just them.

    Only where types do not tell what varies, as under pmap: no type says "alike in each row".
    """

    axis: str
    size: int

    @property
    def rows(self) -> list[list[int]]:
        """The devices of each row, by their number along the axis, which is bound."""
        return np.arange(lax.axis_size(self.axis)).reshape(-1, self.size).tolist()

    def reduce(self, reduction: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
        return reduction(x, self.axis, axis_index_groups=self.rows)


Along = str | Neighbours
"""What a mean is taken along."""


def as_tuple(axes: AxisNames) -> tuple[str, ...]:
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)


def manual() -> tuple[str, ...]:
    """The axes that pmap or shard_map bound here (vmap's do not show)."""
    return compat.manual_axes()


def varying(tree: Tree) -> frozenset[str]:
    """The axes over which some leaf is known to vary (only check_vma=True tells)."""
    return frozenset().union(*(varying_of(jax.typeof(x)) for x in jax.tree.leaves(tree)))


def varying_of(abstract: Any) -> frozenset[str]:
    """The same of an abstract value or a `ShapeDtypeStruct`."""
    return compat.varying_axes(abstract)


def tracked() -> bool:
    """Whether the types here say what varies: shard_map with check_vma=True."""
    axes = manual()
    return bool(axes) and bool(varying(_cast(jnp.zeros(()), axes)))


def vary(tree: Tree, axes: Any) -> Tree:
    """The same values, typed as varying over those of `axes` that are manual here."""
    wanted = [axis for axis in manual() if axis in frozenset(axes)]
    return jax.tree.map(lambda x: _cast(x, wanted), tree) if wanted else tree


def _cast(x: jax.Array, axes: Any) -> jax.Array:
    missing = tuple(axis for axis in axes if axis not in varying_of(jax.typeof(x)))
    return compat.cast_to_varying(x, missing) if missing else x


def carried(start: Tree, step: Callable[[Tree], Tree]) -> Tree:
    """The start of a loop, each leaf varying over every axis over which steps make it vary."""
    while tracked():
        kinds = jax.eval_shape(step, start)
        wider = jax.tree.map(lambda x, kind: _cast(x, varying_of(kind)), start, kinds)
        if jax.tree.map(jax.typeof, wider) == jax.tree.map(jax.typeof, start):
            break
        start = wider
    return start


def while_loop(
    go_on: Callable[[Tree], jax.Array], step: Callable[[Tree], Tree], start: Tree
) -> Tree:
    """`lax.while_loop`, where devices may take more steps than others: a count is their own too."""
    start = carried(start, step)
    own = varying_of(jax.eval_shape(go_on, start))
    start, taken = vary(start, own), lambda carry: vary(step(carry), own)
    return lax.while_loop(go_on, taken, carried(start, taken))


def bound(axes: AxisNames, *, where: str) -> tuple[str, ...]:
    """Those of `axes` that are bound; none of them is bound under plain jit, and that is fine.

    Raises:
        ValueError: other axes are bound here, but not this one.
    """
    found = tuple(axis for axis in as_tuple(axes) if _is_bound(axis))
    for axis in as_tuple(axes):
        if axis not in found and (manual() or found):
            raise ValueError(
                f"{where} averages over the axis {axis!r}, which is not bound here; bound are "
                f"{manual() or found}. Use the name given to pmap or to the mesh of shard_map."
            )
    return found


def _is_bound(axis: str) -> bool:
    try:
        lax.axis_size(axis)
    except NameError:
        return False
    return True


def mean(tree: Tree, axes: tuple[Along, ...], weight: jax.Array | None = None) -> Tree:
    """The mean over bound axes of every floating leaf, weighted by each device's `weight`.

    What is known not to vary over an axis is its own mean there and costs nothing, and counts by
    the weight of all devices along it; integers, booleans and keys are left alone. Of states
    that are overwritten by their gradients it is the largest.
    """
    if not axes:
        return tree
    typed = tracked()

    def average(path: Path, x: jax.Array) -> jax.Array:
        over = tuple(a for a in axes if not typed or a in varying_of(jax.typeof(x)))
        if not over or not is_float(x):
            return x
        if is_overwritten(path):
            return _reduced(lax.pmax, x, over)
        if weight is None:
            return _reduced(lax.pmean, x, over)
        alike = tuple(a for a in manual() if typed and a in varying(weight) - varying(x))
        w = vary(lax.psum(widen(weight), alike) if alike else widen(weight), over)
        weighed = jnp.where(w == 0, 0, w * widen(x))
        return ratio(total(weighed, over), total(w, over)).astype(x.dtype)

    return map_with_path(average, tree)


def total(x: jax.Array, over: tuple[Along, ...]) -> jax.Array:
    """The sum over bound axes, of one array."""
    return _reduced(lax.psum, x, over)


def _reduced(
    reduction: Callable[..., jax.Array], x: jax.Array, over: tuple[Along, ...]
) -> jax.Array:
    names = tuple(a for a in over if isinstance(a, str))
    x = reduction(x, names) if names else x
    for part in over:
        x = part.reduce(reduction, x) if isinstance(part, Neighbours) else x
    return x


def last(x: jax.Array, over: tuple[str, ...]) -> jax.Array:
    """What the last device along bound axes has, of one array."""
    index, size = index_and_size(over)
    return lax.psum(jnp.where(index == size - 1, x, jnp.zeros_like(x)), over).astype(x.dtype)


def mean_over_visible(tree: Tree) -> Tree:
    """The mean over every axis that the types show: one number for all devices."""
    axes = varying(tree)
    return mean(tree, tuple(a for a in manual() if a in axes)) if axes else tree


def index_and_size(over: tuple[Along, ...]) -> tuple[jax.Array | int, int]:
    """This device's number along the axes, first axis slowest, and how many there are."""
    index: jax.Array | int = 0
    size = 1
    for part in over:
        if isinstance(part, Neighbours):
            here, count = lax.axis_index(part.axis) % part.size, part.size
        else:
            here, count = lax.axis_index(part), lax.axis_size(part)
        index, size = index * count + here, size * count
    return index, size


def last_of_size(size: int, names: tuple[str, ...]) -> tuple[Along, ...] | None:
    """Along what `size` neighbouring devices lie: the last of these axes that hold just them, or,
    where types do not tell, a row of the only one."""
    tails = (names[start:] for start in reversed(range(len(names))))
    found = next((tail for tail in tails if lax.axis_size(tail) == size), None)
    if found is None and len(names) == 1 and not tracked() and lax.axis_size(names[0]) % size == 0:
        return (Neighbours(names[0], size),)
    return found


def outside(along: tuple[Along, ...], names: tuple[str, ...]) -> tuple[Along, ...]:
    """What does not lie along any of the named axes."""
    axis = lambda part: part.axis if isinstance(part, Neighbours) else part
    return tuple(part for part in along if axis(part) not in names)


def cond(predicate: Any, f: Any, g: Any) -> Tree:
    """`lax.cond(predicate, f, g)` for branches of which only one may vary over a device axis.

    The predicate must be the same on every device if a branch communicates.
    """
    if not tracked():
        return lax.cond(predicate, f, g)
    union = lambda x, y: tuple(varying_of(x) | varying_of(y))
    kinds = jax.tree.map(union, jax.eval_shape(f), jax.eval_shape(g))
    typed = lambda branch: lambda: jax.tree.map(_cast, branch(), kinds)
    return lax.cond(predicate, typed(f), typed(g))
