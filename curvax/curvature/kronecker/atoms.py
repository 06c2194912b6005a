"""Axes of arrays as products of atoms, which follow reshapes and transposes symbolically.

An atom is a digit of a position along some axis of a source: of a parameter, of the batch, or of an
unknown array. A reshape regroups atoms and splits them if it must, a transpose permutes them.
"""

import itertools
import math
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import jax


class Atom(NamedTuple):
    """The digit of `size` values and weight `stride` of the index along an axis of a source."""

    source: Hashable
    axis: int
    stride: int
    size: int


Axis = tuple[Atom, ...]
"""The atoms of one axis of an array, slowest first; () for an axis of size one."""
Axes = tuple[Axis, ...]


def size_of(axis: Iterable[Atom]) -> int:
    return math.prod(atom.size for atom in axis)


def atoms_of(axes: Iterable[Axis]) -> Axis:
    return tuple(itertools.chain.from_iterable(axes))


def axes_of(source: Hashable, shape: Sequence[int]) -> Axes:
    """The axes of the source itself, one atom each."""
    return tuple(
        (Atom(source, axis, 1, size),) if size != 1 else () for axis, size in enumerate(shape)
    )


def merged(axis: Iterable[Atom]) -> Axis:
    """The same axis with neighbouring digits of one index joined to one atom."""
    found: list[Atom] = []
    for atom in axis:
        last = found[-1] if found else None
        if last and last[:2] == atom[:2] and last.stride == atom.stride * atom.size:
            found[-1] = Atom(*atom[:3], last.size * atom.size)
        else:
            found.append(atom)
    return tuple(found)


def canonical(axis: Iterable[Atom]) -> Axis:
    """The atoms of an index in the order of its source, joined where they can be."""
    return merged(sorted(axis, key=lambda atom: (str(atom.source), atom.axis, -atom.stride)))


def regrouped(axes: Axes, shape: Sequence[int]) -> Axes | None:
    """The axes after a reshape; None if it does not divide an axis at a boundary of digits."""
    queue, found = list(atoms_of(axes)), []
    for size in shape:
        own, left = list[Atom](), size
        while left > 1:
            if not queue:
                return None
            atom = queue.pop(0)
            if left % atom.size == 0:
                own.append(atom)
                left //= atom.size
            elif atom.size % left == 0:
                slow, fast = cut(atom, left)
                own.append(slow)
                queue.insert(0, fast)
                left = 1
            else:
                return None
        found.append(merged(own))
    return None if queue else tuple(found)


def cut(atom: Atom, count: int) -> tuple[Atom, Atom]:
    """An atom as `count` slow values times the rest, of which `count` is a divisor."""
    rest = atom.size // count
    slow = atom._replace(stride=atom.stride * rest, size=count)
    return slow, atom._replace(size=rest)


def aligned(one: Axis, other: Axis) -> list[tuple[Atom, Atom]] | None:
    """Pairs of digits of equal size of two axes of equal size; None if they do not interlock."""
    first, second, pairs = list(one), list(other), []
    while first and second:
        a, b = first.pop(0), second.pop(0)
        if a.size > b.size and a.size % b.size == 0:
            a, rest = cut(a, b.size)
            first.insert(0, rest)
        elif b.size > a.size and b.size % a.size == 0:
            b, rest = cut(b, a.size)
            second.insert(0, rest)
        elif a.size != b.size:
            return None
        pairs.append((a, b))
    return None if first or second else pairs


def arranged(x: jax.Array, axes: Axes, groups: Sequence[Axis]) -> jax.Array:
    """An array with these axes, reshaped and transposed to one axis for each group of atoms.

    Args:
        x: the array.
        axes: its axes.
        groups: atoms that together are those of `axes`, possibly split further.
    """
    wanted = list(atoms_of(groups))
    own = _split(atoms_of(axes), wanted)
    x = x.reshape([atom.size for atom in own]).transpose([own.index(atom) for atom in wanted])
    return x.reshape([size_of(group) for group in groups])


def restored(x: jax.Array, axes: Axes, groups: Sequence[Axis]) -> jax.Array:
    """The array of which `arranged(array, axes, groups)` is x."""
    wanted = list(atoms_of(groups))
    own = _split(atoms_of(axes), wanted)
    x = x.reshape([atom.size for atom in wanted]).transpose([wanted.index(atom) for atom in own])
    return x.reshape([size_of(axis) for axis in axes])


def _split(axis: Axis, digits: list[Atom]) -> list[Atom]:
    """The atoms of an axis, cut into those of `digits` that are parts of them."""
    found = []
    for atom in axis:
        end = atom.stride * atom.size
        inside = lambda part, a=atom, e=end: (
            part[:2] == a[:2] and a.stride <= part.stride and part.stride * part.size <= e
        )
        found += sorted(filter(inside, digits), key=lambda part: -part.stride)
    return found


def covers(digits: Iterable[Atom], axis: Axis) -> bool:
    """Whether digits, in any order, are exactly those of an axis of a source."""
    return canonical(digits) == canonical(axis)
