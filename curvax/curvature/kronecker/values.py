"""What is known of a value in a program: its axes, and the parameter that it is a view of."""

import itertools
from typing import Any, NamedTuple

from curvax.curvature.kronecker.atoms import Atom, Axes, Axis, atoms_of, axes_of, merged, size_of

Place = tuple[int, ...]
"""The number of an equation at each level of nested programs."""

ROWS = "rows"
"""The source of axes of the batch: axis 0 counts examples, later ones the positions of sites."""


class Value(NamedTuple):
    """A value of a traced program, as far as the walk follows it."""

    axes: Axes
    leaf: int | None = None
    """The parameter whose entries these are, moved or repeated but unchanged."""
    outer: tuple[tuple[int, Axis], ...] = ()
    """(level, atoms) of the axes of that parameter along which scans around here run."""
    product: Place | None = None
    """The product whose result this is, moved but unchanged, and not used elsewhere."""

    scale: int | None = None
    """The number of the site at which that parameter was multiplied by an array of its shape."""
    scalar: bool = False
    """Whether it was a scalar."""

    @property
    def is_whole(self) -> bool:
        """Whether this is a view of a parameter, every entry of which occurs once."""
        own = self.leaf is not None and all(a.source == self.leaf for a in atoms_of(self.axes))
        return own and (self.scale is None or self.scalar)

    def plain(self) -> "Value":
        """The same axes, not followed as a view or as a result of a product."""
        return Value(self.axes)


class Names:
    """Unknown axes, and what they turn out to be where they meet known ones."""

    def __init__(self) -> None:
        self._count = itertools.count()
        self._known: dict[Any, Atom] = {}

    def fresh(self, size: int) -> Axis:
        return () if size == 1 else (Atom(("free", next(self._count), size), 0, 1, size),)

    def unknown(self, aval: Any) -> Value:
        return Value(tuple(self.fresh(size) for size in getattr(aval, "shape", ())))

    def resolved(self, axis: Axis) -> Axis:
        """The axis with every unknown atom replaced by what it was found to be."""
        return merged(map(self._resolve, axis))

    def _resolve(self, atom: Atom) -> Atom:
        while atom.source in self._known:
            known = self._known[atom.source]
            atom = known._replace(stride=known.stride * atom.stride, size=atom.size)
        return atom

    def met(self, one: Axis, other: Axis) -> Axis:
        """The axis of an elementwise function of two arrays with these axes.

        Axes of the batch win over others; unknown axes become known.
        """
        one, other = self.resolved(one), self.resolved(other)
        if one == other or not other:
            return one
        if not one:
            return other
        if self._is_unknown(one) and len(other) == 1:
            self._known[one[0].source] = other[0]
            return other
        if self._is_unknown(other) and len(one) == 1:
            self._known[other[0].source] = one[0]
            return one
        return other if is_of_batch(other) and not is_of_batch(one) else one

    def joined(self, one: Axis, other: Axis) -> Axis:
        """The axis of a value that is one or the other, such as the carry of a scan."""
        found = self.met(one, other)
        same = self.resolved(one) == self.resolved(other)
        return found if same else self.fresh(size_of(one))

    @staticmethod
    def _is_unknown(axis: Axis) -> bool:
        source, size = axis[0].source, axis[0].size
        return len(axis) == 1 and isinstance(source, tuple) and source[2] == size


def is_of_batch(axis: Axis) -> bool:
    return any(atom.source == ROWS for atom in axis)


def parameter(number: int, shape: tuple[int, ...]) -> Value:
    return Value(axes_of(number, shape), leaf=number)
