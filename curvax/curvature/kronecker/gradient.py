"""Kronecker factors of a gradient alone: its outer products over inputs and over outputs."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.curvature.kronecker.atoms import atoms_of, axes_of
from curvax.curvature.kronecker.cells import Eigen
from curvax.curvature.kronecker.factors import KroneckerFactors
from curvax.curvature.kronecker.operator import Structure
from curvax.curvature.kronecker.options import Options
from curvax.curvature.kronecker.plan import Block, LeafReport
from curvax.devices import meshes
from curvax.parameter_roles.layouts import Layout, Leaf, layout_of_tree
from curvax.parameter_roles.roles import Axes

OPTIONS = Options("empirical", "reduce", "separate")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GradientFactors(KroneckerFactors):
    """The matrix (G ⊗ A)^½ of every kernel, A = Σ VᵀV and G = Σ VVᵀ of gradients V.

    It bounds the full second moment of AdaGrad up to the rank of V: Gupta et al., Shampoo,
    arXiv:1802.09568, Lemma 8.
    """

    def inverse(self, damping: Any) -> KroneckerFactors:
        raise ValueError(
            "`style='heuristic'` inverts damped factors, and the matrix of `gradient_kronecker` is "
            "the root of their product. Use `kronecker(style='exact')` or `scale_by_power(0.5)`."
        )

    def trace(self) -> jax.Array:
        return self.eigen().trace()

    def _eigenvalues(self, eigen: Eigen) -> Eigen:
        return eigen._replace(values=jnp.sqrt(eigen.values))

    def _product(self, k: int, matrices: list[jax.Array]) -> list[jax.Array]:
        return self._scaled(k, matrices, lambda values: values)

    def _heuristic(self, k: int, matrices: list[jax.Array], damping: Any) -> list[jax.Array]:
        del k, matrices
        self.inverse(damping)
        return []


def gradient_factors(gradient: Tree, structure: Structure) -> GradientFactors:
    """The factors of one gradient, a tree with the structure of the parameters."""
    leaves = [trees.widen(x) for x in jax.tree.leaves(gradient)]

    def products(leaves: list[jax.Array]) -> Any:
        matrices = [structure.matrices(block, leaves)[0] for block in structure.blocks]
        flipped = lambda v: jnp.swapaxes(v, -1, -2)
        inputs = tuple(flipped(v) @ v for v in matrices)
        outputs = tuple(v @ flipped(v) for v in matrices)
        return inputs, outputs

    with jax.default_matmul_precision("highest"):
        inputs, outputs = meshes.automatically(products, leaves)
    taken = {block.leaf for block in structure.blocks}
    diagonals = {k: jnp.square(x) for k, x in enumerate(leaves) if k not in taken}
    return GradientFactors(inputs, outputs, diagonals, structure)


def structure_of_layout(params: Tree, layout: Layout | None, largest: int) -> Structure:
    """Which parameters are matrices of inputs and outputs, by a layout; by names if it is None.

    Args:
        params: arrays, or their shapes.
        layout: the axes of each parameter.
        largest: size of the largest factor; other kernels get a diagonal.
    """
    paths = jax.tree.leaves_with_path(params)
    if layout is None:
        layout = layout_of_tree(params) if all(path for path, _ in paths) else Layout({})
    names = tuple(trees.label(trees.names(path)) for path, _ in paths)
    shapes = tuple(jnp.shape(x) for _, x in paths)
    found = []
    for number, ((path, _), shape) in enumerate(zip(paths, shapes)):
        leaf = layout[trees.names(path)] if path else None
        found.append(_block(number, shape, leaf, largest))
    blocks = tuple(block for block, _ in found if block is not None)
    return Structure(names, shapes, blocks, tuple(report for _, report in found), OPTIONS)


def _block(
    number: int, shape: tuple[int, ...], leaf: Leaf | None, largest: int
) -> tuple[Block | None, LeafReport]:
    kind = "parameter" if leaf is None else leaf.kind
    depth, inputs, outputs = _sides(shape, leaf)
    sides = [math.prod(shape[axis] for axis in side) for side in (inputs, outputs)]
    if kind in ("norm", "bias") or not inputs or not outputs:
        why = f"is a {kind} without two sides"
    elif max(sides) > largest:
        why = f"has {sides[0]} inputs and {sides[1]} outputs, and the limit is {largest}"
    else:
        axes = axes_of(number, shape)
        side = lambda chosen: atoms_of(axes[axis] for axis in chosen)
        block = Block(number, shape, side(depth), side(outputs), side(inputs))
        why = f"is a {kind} of inputs and outputs"
        return block, LeafReport("kronecker", why, math.prod(shape), block.stacked, *sides)
    return None, LeafReport("diagonal", why, math.prod(shape))


def _sides(shape: tuple[int, ...], leaf: Leaf | None) -> tuple[Axes, Axes, Axes]:
    """The axes of layers, inputs and outputs; where they are unknown the last one is of outputs."""
    depth = () if leaf is None else leaf.depth
    if leaf is not None and (leaf.inputs or leaf.outputs):
        return depth, (*leaf.window, *leaf.inputs), leaf.outputs
    own = tuple(axis for axis in range(len(shape)) if axis not in depth)
    return depth, own[:-1], own[-1:]
