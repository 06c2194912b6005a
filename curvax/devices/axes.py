"""Named device axes: which ones are bound, which ones a value varies over, and means over them.

The same code runs under `pmap`, under `shard_map` with and without `check_vma`, under `vmap` with
an axis name, and under plain `jit`: values are cast to "varying" where types require it, means are
taken over bound axes, and unbound axes are ignored.
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
    """Groups of `size` consecutive devices along an axis, which are not an axis of their own.

    Used only where types do not track what varies, as under `pmap`, since no type expresses "equal
    within each group".
    """

    axis: str
    size: int

    @property
    def rows(self) -> list[list[int]]:
        """The indices of the devices in each group along the axis, which must be bound."""
        return np.arange(lax.axis_size(self.axis)).reshape(-1, self.size).tolist()

    def reduce(self, reduction: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
        return reduction(x, self.axis, axis_index_groups=self.rows)


Along = str | Neighbours
"""An axis, or groups along one, to average over."""


def as_tuple(axes: AxisNames) -> tuple[str, ...]:
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)


def manual() -> tuple[str, ...]:
    """The axes that `pmap` or `shard_map` bound here, without those of `vmap`."""
    return compat.manual_axes()


def varying(tree: Tree) -> frozenset[str]:
    """The axes over which some leaf varies by its type; only `check_vma=True` tracks them."""
    return frozenset().union(*(varying_of(jax.typeof(x)) for x in jax.tree.leaves(tree)))


def varying_of(abstract: Any) -> frozenset[str]:
    """The axes over which an abstract value or a `ShapeDtypeStruct` varies."""
    return compat.varying_axes(abstract)


def tracked() -> bool:
    """Whether types track what varies here, as in `shard_map` with `check_vma=True`."""
    axes = manual()
    return bool(axes) and bool(varying(_cast(jnp.zeros(()), axes)))


def vary(tree: Tree, axes: Any) -> Tree:
    """The same values, typed as varying over those of `axes` that are bound here."""
    wanted = [axis for axis in manual() if axis in frozenset(axes)]
    return jax.tree.map(lambda x: _cast(x, wanted), tree) if wanted else tree


def _cast(x: jax.Array, axes: Any) -> jax.Array:
    missing = tuple(axis for axis in axes if axis not in varying_of(jax.typeof(x)))
    return compat.cast_to_varying(x, missing) if missing else x


def carried(start: Tree, step: Callable[[Tree], Tree]) -> Tree:
    """The initial carry of a loop, varying over all axes over which a step makes it vary."""
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
    """`lax.while_loop` whose number of steps may differ between devices.

    The whole carry, counters included, is typed as varying over the axes of the condition.
    """
    start = carried(start, step)
    own = varying_of(jax.eval_shape(go_on, start))
    start, taken = vary(start, own), lambda carry: vary(step(carry), own)
    return lax.while_loop(go_on, taken, carried(start, taken))


def bound(axes: AxisNames, *, where: str) -> tuple[str, ...]:
    """Those of `axes` that are bound; none under plain `jit`.

    Raises:
        ValueError: an axis is not bound although others are.
    """
    found = tuple(axis for axis in as_tuple(axes) if _is_bound(axis))
    for axis in as_tuple(axes):
        if axis not in found and (manual() or found):
            raise ValueError(
                f"{where} averages over the axis {axis!r}, which is not bound here; bound are "
                f"{manual() or found}. Use the name passed to `pmap` or to the mesh of `shard_map`."
            )
    return found


def _is_bound(axis: str) -> bool:
    try:
        lax.axis_size(axis)
    except NameError:
        return False
    return True


def mean(tree: Tree, axes: tuple[Along, ...], weight: jax.Array | None = None) -> Tree:
    """The weighted mean of every floating leaf over bound axes.

    A leaf that does not vary over an axis, by its type, is its own mean there: it takes no
    collective, and its weight is the total over the devices along that axis. Integers, booleans and
    keys are returned unchanged. States that are overwritten by their gradients take the maximum.

    Args:
        tree: a pytree of arrays.
        axes: bound axes.
        weight: the weight of this device, a scalar; None for equal weights.
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
    """The sum of an array over bound axes."""
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
    """The value of an array on the last device along bound axes."""
    index, size = index_and_size(over)
    return lax.psum(jnp.where(index == size - 1, x, jnp.zeros_like(x)), over).astype(x.dtype)


def mean_over_visible(tree: Tree) -> Tree:
    """The mean over all axes that the tree varies over by its types."""
    axes = varying(tree)
    return mean(tree, tuple(a for a in manual() if a in axes)) if axes else tree


def index_and_size(over: tuple[Along, ...]) -> tuple[jax.Array | int, int]:
    """(index of this device along the axes, first axis slowest, number of devices)"""
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
    """The trailing axes in `names` that hold exactly `size` neighbouring devices.

    With a single axis, and if types do not track what varies, `Neighbours` along it. None if there
    are no such axes.
    """
    tails = (names[start:] for start in reversed(range(len(names))))
    found = next((tail for tail in tails if lax.axis_size(tail) == size), None)
    if found is None and len(names) == 1 and not tracked() and lax.axis_size(names[0]) % size == 0:
        return (Neighbours(names[0], size),)
    return found


def outside(along: tuple[Along, ...], names: tuple[str, ...]) -> tuple[Along, ...]:
    """Those of `along` that are not along any of the named axes."""
    axis = lambda part: part.axis if isinstance(part, Neighbours) else part
    return tuple(part for part in along if axis(part) not in names)


def cond(predicate: Any, f: Any, g: Any) -> Tree:
    """`lax.cond(predicate, f, g)` for branches whose results vary over different device axes.

    The predicate must be equal on all devices if a branch contains a collective.
    """
    if not tracked():
        return lax.cond(predicate, f, g)
    union = lambda x, y: tuple(varying_of(x) | varying_of(y))
    kinds = jax.tree.map(union, jax.eval_shape(f), jax.eval_shape(g))
    typed = lambda branch: lambda: jax.tree.map(_cast, branch(), kinds)
    return lax.cond(predicate, typed(f), typed(g))
