"""The axes of the results of an equation, from those of its arguments."""

from collections.abc import Callable, Sequence
from typing import Any

from curvax.curvature.kronecker.atoms import Axes, regrouped
from curvax.curvature.kronecker.values import Names, Value

UNCHANGED = (
    "convert_element_type", "copy", "copy_p", "sharding_constraint", "optimization_barrier",
    "reduce_precision", "pvary", "pcast", "reshard", "mesh_cast", "name",
)  # fmt: skip
"""Primitives whose results are their arguments, up to rounding."""

ELEMENTWISE = (
    "add", "add_any", "sub", "mul", "div", "max", "min", "pow", "atan2", "rem", "select_n",
)  # fmt: skip
"""Primitives that combine arrays of the same shape, or of axes of size one instead."""


def is_move(eqn: Any) -> bool:
    """Whether an equation only moves, repeats or rounds the entries of its argument."""
    return eqn.primitive.name in MOVES


def moved(eqn: Any, values: Sequence[Value], names: Names) -> list[Value]:
    """The results of an equation that `is_move`.

    A view of a parameter stays one, unless a reshape does not divide an axis at its digits.
    """
    return [_moved(eqn, value, var, names) for value, var in zip(values, eqn.outvars)]


def _moved(eqn: Any, value: Value, var: Any, names: Names) -> Value:
    axes = MOVES[eqn.primitive.name](eqn, value.axes, var.aval.shape, names)
    if axes is None:
        return names.unknown(var.aval)
    return value._replace(axes=axes)


def _kept(eqn: Any, axes: Axes, shape: Any, names: Names) -> Axes:
    return axes


def _transposed(eqn: Any, axes: Axes, shape: Any, names: Names) -> Axes:
    return tuple(axes[i] for i in eqn.params["permutation"])


def _reshaped(eqn: Any, axes: Axes, shape: Any, names: Names) -> Axes | None:
    if eqn.params.get("dimensions") is not None:
        return None
    return regrouped(axes, shape)


def _broadcast(eqn: Any, axes: Axes, shape: Any, names: Names) -> Axes:
    place = {to: i for i, to in enumerate(eqn.params["broadcast_dimensions"])}
    own = lambda i: axes[place[i]] if i in place else ()
    return tuple(own(i) or names.fresh(size) for i, size in enumerate(shape))


def _squeezed(eqn: Any, axes: Axes, shape: Any, names: Names) -> Axes:
    return tuple(axis for i, axis in enumerate(axes) if i not in eqn.params["dimensions"])


MOVES: dict[str, Callable[[Any, Axes, Any, Names], Axes | None]] = {
    **dict.fromkeys(UNCHANGED, _kept),
    "transpose": _transposed,
    "reshape": _reshaped,
    "broadcast_in_dim": _broadcast,
    "squeeze": _squeezed,
}


def results(eqn: Any, values: Sequence[Value], names: Names) -> list[Value]:
    """The results of any other equation, of which only the axes are followed."""
    name = eqn.primitive.name
    if name == "dot_general":
        return [Value(product_axes(eqn, values[0], values[1], names))]
    if name == "conv_general_dilated":
        return [Value(convolution_axes(eqn, values[0].axes, names))]
    if name == "gather":
        return [Value(lookup_axes(eqn, values[0].axes, values[1].axes, names))]
    if name.startswith(("reduce_", "arg")) and "axes" in eqn.params:
        kept = [axis for i, axis in enumerate(values[0].axes) if i not in eqn.params["axes"]]
        return [Value(tuple(kept)) for _ in eqn.outvars]
    if name == "while":
        values = values[len(values) - len(eqn.outvars) :]
        return [value.plain() for value in values]
    return [Value(_alike(eqn, var, values, names)) for var in eqn.outvars]


def _alike(eqn: Any, var: Any, values: Sequence[Value], names: Names) -> Axes:
    """The axes of arguments of the same rank, where they have the same size."""
    shape = getattr(var.aval, "shape", ())
    found: list[Any] = [() for _ in shape]
    for value, given in zip(values, eqn.invars):
        own = getattr(given.aval, "shape", ())
        if len(own) != len(shape):
            continue
        for i, size in enumerate(shape):
            if own[i] == size:
                found[i] = names.met(found[i], value.axes[i])
    return tuple(axis or names.fresh(size) for axis, size in zip(found, shape))


def product_axes(eqn: Any, left: Value, right: Value, names: Names) -> Axes:
    """The axes of a `dot_general`: of the batch, and those that are free on both sides."""
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    batch = [names.met(left.axes[i], right.axes[j]) for i, j in zip(lb, rb)]
    free = [axis for i, axis in enumerate(left.axes) if i not in (*lc, *lb)]
    return (*batch, *free, *(axis for i, axis in enumerate(right.axes) if i not in (*rc, *rb)))


def convolution_axes(eqn: Any, axes: Axes, names: Names) -> Axes:
    """The axes of a convolution, of which only that of the examples is known."""
    lhs, _, out = eqn.params["dimension_numbers"]
    shape = eqn.outvars[0].aval.shape
    found = [names.fresh(size) for size in shape]
    if eqn.params["batch_group_count"] == 1:
        found[out[0]] = axes[lhs[0]]
    return tuple(found)


def lookup_axes(eqn: Any, axes: Axes, indices: Axes, names: Names) -> Axes:
    """The axes of a `gather`: of whole slices of the operand, and of the indices."""
    numbers, shape = eqn.params["dimension_numbers"], eqn.outvars[0].aval.shape
    whole, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    kept = [i for i in range(len(whole)) if i not in dropped]
    inside = dict(zip(numbers.offset_dims, kept))
    others = iter(indices[:-1])
    found = []
    for i, size in enumerate(shape):
        if i not in inside:
            found.append(next(others))
        elif sizes[inside[i]] == whole[inside[i]]:
            found.append(axes[inside[i]])
        else:
            found.append(names.fresh(size))
    return tuple(found)
