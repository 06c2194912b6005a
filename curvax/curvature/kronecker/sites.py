"""The places of a program at which a parameter meets activations."""

from typing import Any, NamedTuple

from curvax.curvature.kronecker.atoms import Atom, Axes, Axis, atoms_of, regrouped, size_of
from curvax.curvature.kronecker.rules import (
    ELEMENTWISE,
    convolution_axes,
    lookup_axes,
    product_axes,
)
from curvax.curvature.kronecker.values import Names, Place, Value


class Level(NamedTuple):
    """A scan around an equation."""

    length: int
    axis: Axis
    """The axis that it runs along, as far as its sequences tell."""


class Bias(NamedTuple):
    """A parameter that is added to the result of a product."""

    leaf: int
    pairs: tuple[tuple[Atom, Atom], ...]
    """(digit of the kernel, digit of the bias): the axes of outputs and of layers."""
    outer: tuple[tuple[int, Axis], ...]


class Site(NamedTuple):
    """One use of a parameter, the axes of the activations and of the results there."""

    place: Place
    kind: str
    """`product`, `convolution`, `lookup`; `repeated`, if only repeated over the batch; or `factor`,
    if multiplied by an array of its shape before that."""
    leaf: int
    operand: int
    """The argument of the equation that is the parameter."""
    outer: tuple[tuple[int, Axis], ...]
    levels: tuple[Level, ...]
    stack: Axis
    """Axes of the parameter that number layers, or groups of a convolution."""
    inputs: Axis
    """Axes of the parameter that are summed over."""
    outputs: Axis
    given: Axes
    """The axes of the activations that the parameter multiplies; of patches for a convolution."""
    result: Axes
    """The axes of what the derivative is taken in: of the result, or of a repeated parameter."""
    aval: Any
    """The type of it, without those of scans around it."""
    eqn: Any
    bias: Bias | None = None
    scale: int | None = None
    """The number of the `factor` that the parameter was multiplied by before."""


def site_of(
    eqn: Any, place: Place, values: list[Value], levels: tuple[Level, ...], names: Names
) -> Site | None:
    """The site that an equation is, or None if it does not multiply a parameter.

    The axes of the parameter stand for those of the activations that they meet.
    """
    whole = [n for n, value in enumerate(values) if value.is_whole]
    make = MAKERS.get(eqn.primitive.name)
    if make is None or len(whole) != 1:
        return None
    return make(eqn, place, values, whole[0], levels, names)


def _product(
    eqn: Any, place: Place, values: list[Value], n: int, levels: tuple[Level, ...], names: Names
) -> Site | None:
    summed, batch = eqn.params["dimension_numbers"]
    kernel, other = values[n], values[1 - n]
    clash = lambda axis: any(atom.source == kernel.leaf for atom in axis)
    given = [names.fresh(size_of(axis)) if clash(axis) else axis for axis in other.axes]
    for own, theirs in (*zip(summed[n], summed[1 - n]), *zip(batch[n], batch[1 - n])):
        given[theirs] = kernel.axes[own]
    free = [axis for i, axis in enumerate(kernel.axes) if i not in (*summed[n], *batch[n])]
    pair: list[Any] = [kernel, kernel]
    pair[1 - n] = Value(tuple(given))
    return Site(
        place, "product", _leaf(kernel), n, kernel.outer, levels,
        stack=atoms_of(kernel.axes[i] for i in batch[n]),
        inputs=atoms_of(kernel.axes[i] for i in summed[n]),
        outputs=atoms_of(free),
        given=tuple(given),
        result=product_axes(eqn, pair[0], pair[1], names),
        aval=eqn.outvars[0].aval,
        eqn=eqn,
        scale=kernel.scale,
    )  # fmt: skip


def _convolution(
    eqn: Any, place: Place, values: list[Value], n: int, levels: tuple[Level, ...], names: Names
) -> Site | None:
    (image, kernel), groups = values, eqn.params["feature_group_count"]
    if n != 1 or eqn.params["batch_group_count"] != 1:
        return None
    _, rhs, out = eqn.params["dimension_numbers"]
    count = eqn.invars[1].aval.shape[rhs[0]]
    halves = regrouped((kernel.axes[rhs[0]],), (groups, count // groups))
    if halves is None:
        return None
    group, outputs = halves
    inputs = (*kernel.axes[rhs[1]], *atoms_of(kernel.axes[i] for i in rhs[2:]))
    result = list(convolution_axes(eqn, image.axes, names))
    given = list(result)
    result[out[1]], given[out[1]] = (*group, *outputs), (*group, *inputs)
    return Site(
        place, "convolution", _leaf(kernel), n, kernel.outer, levels,
        stack=group, inputs=inputs, outputs=outputs,
        given=tuple(given), result=tuple(result), aval=eqn.outvars[0].aval, eqn=eqn,
        scale=kernel.scale,
    )  # fmt: skip


def _lookup(
    eqn: Any, place: Place, values: list[Value], n: int, levels: tuple[Level, ...], names: Names
) -> Site | None:
    table, indices = values
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    rows, shape = numbers.collapsed_slice_dims, eqn.invars[0].aval.shape
    slices = all(size == shape[i] for i, size in enumerate(sizes) if i not in rows)
    single = len(rows) == 1 and tuple(numbers.start_index_map) == tuple(rows)
    batched = numbers.operand_batching_dims or table.scale is not None
    if n != 0 or batched or not single or not slices:
        return None
    return Site(
        place, "lookup", _leaf(table), n, table.outer, levels,
        stack=(),
        inputs=table.axes[rows[0]],
        outputs=atoms_of(axis for i, axis in enumerate(table.axes) if i not in rows),
        given=indices.axes[:-1],
        result=lookup_axes(eqn, table.axes, indices.axes, names),
        aval=eqn.outvars[0].aval,
        eqn=eqn,
    )  # fmt: skip


MAKERS = {"dot_general": _product, "conv_general_dilated": _convolution, "gather": _lookup}


def _leaf(value: Value) -> int:
    assert value.leaf is not None
    return value.leaf


def repeated(
    eqn: Any, place: Place, n: int, value: Value, result: Value, levels: tuple[Level, ...]
) -> Site:
    """The site at which argument `n` is a parameter, repeated along the axes of the batch.

    An argument that the equation itself repeats is taken with the axes of its result.
    """
    aval, axes = eqn.invars[n].aval, value.axes
    if eqn.primitive.name in ELEMENTWISE and aval.shape != eqn.outvars[0].aval.shape:
        aval = eqn.outvars[0].aval.update(dtype=aval.dtype, weak_type=False)
        padded = axes if axes else ((),) * len(aval.shape)
        axes = tuple(own or other for own, other in zip(padded, result.axes))
    own = tuple(atom for atom in atoms_of(axes) if atom.source == value.leaf)
    return Site(
        place, "repeated", _leaf(value), n, value.outer, levels,
        stack=(), inputs=(), outputs=own, given=(), result=axes, aval=aval, eqn=eqn,
        scale=value.scale,
    )  # fmt: skip


def factor(
    eqn: Any, place: Place, n: int, values: list[Value], levels: tuple[Level, ...]
) -> Site | None:
    """The site at which argument `n`, a parameter, is multiplied by an array of no larger shape.

    Whether that array differs between examples is known only at the end of the walk.
    """
    value, other = values[n], values[1 - n]
    first = value.is_whole and value.scale is None and other.leaf is None
    divides = eqn.primitive.name == "div" and n == 1
    if not first or divides or eqn.outvars[0].aval.shape != eqn.invars[n].aval.shape:
        return None
    return Site(
        place, "factor", _leaf(value), n, value.outer, levels,
        stack=(), inputs=(), outputs=(), given=value.axes, result=other.axes,
        aval=eqn.invars[1 - n].aval, eqn=eqn,
    )  # fmt: skip
