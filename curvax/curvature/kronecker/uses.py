"""A site ↦ how its activations and their cotangents are laid out as rows of a matrix."""

import itertools
from typing import NamedTuple

from curvax.curvature.kronecker.atoms import Atom, Axes, Axis, atoms_of, canonical, size_of
from curvax.curvature.kronecker.sites import Site
from curvax.curvature.kronecker.values import ROWS, Names


class Use(NamedTuple):
    """One use of a parameter: [layers, examples, positions, features] on both sides."""

    number: int
    """The number of its site."""
    site: Site
    given: Axes
    """The axes of the activations, those of scans first."""
    result: Axes
    """The axes of the cotangents."""
    stack: Axis
    inputs: Axis
    outputs: Axis
    examples: Axis
    positions: Axis
    factor: Site | None = None
    """What the parameter was multiplied by before, if it was."""

    @property
    def count(self) -> int:  # type: ignore[override]
        """The number of positions of an example."""
        return size_of(self.positions)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the cotangents, over all scans."""
        return (*(level.length for level in self.site.levels), *self.site.aval.shape)

    @property
    def of_rows(self) -> Axes:
        return self.stack, self.examples, self.positions


def use_of(number: int, sites: list[Site], names: Names, n: int) -> Use | str:
    """The layout of one of the sites, or why there is none."""
    site = sites[number]
    scale = None if site.scale is None else sites[site.scale]
    if scale is not None and (why := _refused(scale, site, names)):
        return why
    outer = dict(site.outer)
    levels = [
        outer[k] if k in outer else names.resolved(level.axis)
        for k, level in enumerate(site.levels)
    ]
    full = lambda axes: _distinct((*levels, *map(names.resolved, axes)))
    given, result = full(site.given), full(site.result)
    stack = canonical((*atoms_of(axis for _, axis in site.outer), *site.stack))
    inputs, outputs = canonical(site.inputs), canonical(site.outputs)
    rows = _outside(result, site)
    if site.kind != "repeated" and {*rows} != {*_outside(given, site)}:
        return "its activations and its results have other axes"
    examples = tuple(sorted(filter(_is_example, rows), key=lambda atom: -atom.stride))
    if canonical(examples) != canonical((Atom(ROWS, 0, 1, n),) if n > 1 else ()):
        what = "it is" if site.kind == "repeated" else "its activations are"
        return f"{what} not laid out along the examples"
    positions = tuple(atom for atom in rows if atom not in examples)
    return Use(
        number, site, given, result, stack, inputs, outputs, examples, positions, factor=scale
    )


def _refused(factor: Site, site: Site, names: Names) -> str:
    """Why the factor of a parameter cannot be accounted for, or ""."""
    if any(atom.source == ROWS for axis in factor.result for atom in names.resolved(axis)):
        return "it is multiplied by something of each example"
    if factor.levels != site.levels or len(site.outer) != len(site.levels):
        return "it is multiplied by something outside of this scan"
    return ""


def _is_example(atom: Atom) -> bool:
    return atom.source == ROWS and atom.axis == 0


def _outside(axes: Axes, site: Site) -> Axis:
    return tuple(atom for atom in atoms_of(axes) if atom.source != site.leaf)


def _distinct(axes: Axes) -> Axes:
    """The axes with atoms that occurred before renamed, in the same order on both sides."""
    seen: set[Atom] = set()
    counter = itertools.count()

    def own(atom: Atom) -> Atom:
        if atom in seen:
            return atom._replace(source=("again", next(counter)))
        seen.add(atom)
        return atom

    return tuple(tuple(map(own, axis)) for axis in axes)
