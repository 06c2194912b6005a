"""A part of the batch ↦ its factors, which are then averaged over parts and devices."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.curvature.kronecker.cells import Cell, combined
from curvax.curvature.kronecker.cotangents import columns
from curvax.curvature.kronecker.factors import KroneckerFactors
from curvax.curvature.kronecker.operator import Structure
from curvax.curvature.kronecker.options import Options
from curvax.curvature.kronecker.plan import Plan
from curvax.curvature.kronecker.statistics import (
    cotangents_of,
    halves,
    input_factor,
    inputs_of_blocks,
    output_factor,
    squares,
)
from curvax.curvature.kronecker.tapped import Tapped
from curvax.curvature.kronecker.taps import Arrays
from curvax.devices import meshes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """The factors of a part of the batch."""

    inputs: tuple[tuple[jax.Array, ...], ...]
    """A of the uses of each block as it is, and of those with inputs and outputs exchanged."""
    outputs: tuple[tuple[jax.Array, ...], ...]
    diagonals: dict[int, jax.Array]
    structure: Structure = dataclasses.field(metadata={"static": True})

    def finished(self, local: frozenset[str]) -> KroneckerFactors:
        """The factors of these sums, after they have been averaged except over `local`."""
        cells = [self._cell(k) for k in range(len(self.inputs))]
        inputs, outputs = [cell.inputs for cell in cells], [cell.outputs for cell in cells]
        structure = dataclasses.replace(self.structure, local=local)
        return KroneckerFactors(tuple(inputs), tuple(outputs), self.diagonals, structure)

    def _cell(self, k: int) -> Cell:
        stacked = self.structure.blocks[k].stacked
        own = lambda x: x.reshape(*stacked, *x.shape[1:])
        cells = [Cell(own(a), own(g)) for a, g in zip(self.inputs[k], self.outputs[k])]
        if len(cells) > 1:
            cells[1] = Cell(cells[1].outputs, cells[1].inputs)
        return combined(cells)


def sums_of(at: Tapped, options: Options, *draws: Tree) -> Sums:
    """The factors of a part of the batch.

    Args:
        at: the model at that part.
        options: how factors are made.
        draws: labels or keys of the examples, if labels are sampled.
    """
    part, leaves = at.part, jax.tree.leaves(at.params)
    structure = structure_of(at.plan, at.params, options)

    def input_factors(seen: Arrays, sites: jax.Array | None) -> Any:
        rows = inputs_of_blocks(at.plan, seen, sites, part.size, structure.joint)
        return tuple(tuple(input_factor(x, options.sharing) for x in own) for own in rows)

    def output_factors(pulled: Arrays, seen: Arrays, loose: list[jax.Array]) -> Any:
        outputs = tuple(
            tuple(output_factor(cotangents_of(half, pulled), options.sharing) for half in own)
            for own in halves(at.plan)
        )
        exact = {
            leaf: squares(uses, pulled, seen, jnp.shape(leaves[leaf]))
            for leaf, uses in at.plan.repeated.items()
        }
        estimated = {k: jnp.square(trees.widen(g)) for k, g in zip(at.plan.loose, loose)}
        return outputs, exact | estimated

    inputs = meshes.automatically(input_factors, at.seen, at.sites)
    of_column = lambda pulled, loose: meshes.automatically(output_factors, pulled, at.seen, loose)

    outputs, diagonals = at.total(columns(part, at.outputs, options.fisher, *draws), of_column)
    unused = {
        leaf: jnp.zeros(jnp.shape(x), trees.wide_dtype(jnp.result_type(x)))
        for leaf, x in enumerate(leaves)
        if trees.is_float(x) and structure.reports[leaf].treatment == "none"
    }
    return Sums(inputs, outputs, diagonals | unused, structure)


def structure_of(plan: Plan, params: Tree, options: Options) -> Structure:
    """What does not change from step to step."""
    leaves = jax.tree.leaves_with_path(params)
    names = tuple(trees.label(trees.names(path)) for path, _ in leaves)
    shapes = tuple(jnp.shape(x) for _, x in leaves)
    return Structure(names, shapes, plan.blocks, plan.reports, options)
