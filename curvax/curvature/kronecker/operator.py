"""A curvature matrix of Kronecker blocks and a diagonal, as an operator on trees of parameters."""

from __future__ import annotations

import abc
import dataclasses
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.curvature.kronecker.atoms import arranged, axes_of, restored
from curvax.curvature.kronecker.cells import powers
from curvax.curvature.kronecker.options import Options
from curvax.curvature.kronecker.plan import Block, LeafReport
from curvax.devices import meshes
from curvax.linalg.kronecker import STYLES


@dataclasses.dataclass(frozen=True)
class Structure:
    """What does not change from step to step: which parameter is in which block, and how."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    blocks: tuple[Block, ...]
    reports: tuple[LeafReport, ...]
    options: Options
    local: frozenset[str] = frozenset()
    """The device axes over which the matrix is this device's own."""

    @property
    def joint(self) -> bool:
        """Whether a bias is the last column of its kernel."""
        return self.options.bias == "joint"

    def matrices(self, block: Block, leaves: list[Any]) -> list[jax.Array]:
        """[V | b], the kernel with the bias as its last column, or both apart."""
        stack = tuple((atom,) for atom in block.stack)
        kernel = axes_of(block.leaf, block.shape)
        v = arranged(leaves[block.leaf], kernel, (*stack, block.outputs, block.inputs))
        if block.bias is None:
            return [v]
        stack = tuple((atom,) for atom in block.bias_stack)
        own = axes_of(block.bias, block.bias_shape)
        b = arranged(leaves[block.bias], own, (*stack, block.bias_outputs))
        b = b.reshape(*v.shape[:-1], 1)
        return [jnp.concatenate([v, b], axis=-1)] if self.joint else [v, b]

    def leaves(self, block: Block, matrices: list[jax.Array]) -> dict[int, jax.Array]:
        """The parameters of which `matrices` are those."""
        v, *rest = matrices
        if block.bias is not None and self.joint:
            v, rest = v[..., :-1], [v[..., -1:]]
        stack = tuple((atom,) for atom in block.stack)
        kernel = axes_of(block.leaf, block.shape)
        found = {block.leaf: restored(v, kernel, (*stack, block.outputs, block.inputs))}
        if block.bias is not None:
            stack = tuple((atom,) for atom in block.bias_stack)
            own = axes_of(block.bias, block.bias_shape)
            found[block.bias] = restored(rest[0], own, (*stack, block.bias_outputs))
        return found


Map = Callable[[int, list[jax.Array]], list[jax.Array]]
"""(number of the block, its matrices) ↦ matrices."""


class BlockOperator(abc.ABC):
    """A positive semi-definite matrix C of blocks, one for each kernel, and a diagonal."""

    structure: Structure
    diagonals: dict[int, jax.Array]

    def __call__(self, v: Tree) -> Tree:
        return self._applied(v, self._product, lambda d: d)

    def power(self, v: Tree, exponent: Any, damping: Any = 0.0) -> Tree:
        """(C + λI)^ξ v, in the eigenbasis of each block.

        Args:
            v: a tree like the parameters.
            exponent: ξ, a number or scalar array.
            damping: λ >= 0, in the units of C. At 0 a negative power of an eigenvalue that is 0
                within rounding counts as 0, as in a pseudo-inverse.
        """
        return self.scaled(v, lambda values: powers(values, exponent, damping))

    def scaled(self, v: Tree, by: Callable[[jax.Array], jax.Array]) -> Tree:
        """f(C) v for a function of the eigenvalues.

        Args:
            v: a tree like the parameters.
            by: f, on arrays of eigenvalues >= 0 whose last two axes are those of one block.
        """
        apply = lambda k, matrices: self._scaled(k, matrices, by)
        return self._applied(v, apply, lambda d: by(d[None, None])[0, 0])

    def solve(self, v: Tree, damping: Any, style: str = "exact") -> Tree:
        """(C + λI)⁻¹ v.

        Args:
            v: a tree like the parameters.
            damping: λ >= 0, in the units of C; positive for `heuristic`.
            style: `exact` takes the eigenvectors of the factors, `heuristic` the inverses of the
                damped factors, (G + √λ/π I)⁻¹ ⊗ (A + √λ π I)⁻¹ with π² = (tr A / dim A) / (tr G /
                dim G). Martens & Grosse, arXiv:1503.05671, section 6.3.

        Raises:
            ValueError: `style` is not one of these, or the damping is not positive.
        """
        self._check_style(style, damping)
        if style == "exact":
            return self.power(v, -1, damping)
        apply = lambda k, matrices: self._heuristic(k, matrices, damping)
        return self._applied(v, apply, lambda d: 1 / (d + damping))

    @abc.abstractmethod
    def trace(self) -> jax.Array:
        """tr C, a scalar."""

    @abc.abstractmethod
    def eigenvalues(self) -> dict[str, jax.Array]:
        """Those of the block of each kernel and of each diagonal, in descending order.

        Returns:
            `{path: [*layers, n]}`; a bias in the block of its kernel is counted there.
        """

    def condition_numbers(self, damping: Any = 0.0) -> dict[str, jax.Array]:
        """(λ_max + λ) / (λ_min + λ) of each block, `{path: [*layers]}`; infinite if singular.

        Args:
            damping: λ >= 0, in the units of C.
        """
        ends = {name: (e[..., 0], e[..., -1]) for name, e in self.eigenvalues().items()}
        return {name: (top + damping) / (low + damping) for name, (top, low) in ends.items()}

    def report(self) -> dict[str, LeafReport]:
        """`{path: LeafReport}`: which parameter is in which kind of block, and why."""
        return dict(zip(self.structure.names, self.structure.reports))

    def _applied(self, v: Tree, to_block: Map, to_diagonal: Callable[[Any], Any]) -> Tree:
        v = trees.arrays(v)
        leaves, treedef = jax.tree.flatten(meshes.gathered(v))
        self._check_tree(leaves)
        wide = trees.wide_floats(leaves)
        found: dict[int, jax.Array] = {}
        for k, block in enumerate(self.structure.blocks):
            matrices = to_block(k, self.structure.matrices(block, wide))
            found |= self.structure.leaves(block, matrices)
        for leaf, d in self.diagonals.items():
            found[leaf] = to_diagonal(d) * wide[leaf]
        own = lambda k, x: found[k].astype(x.dtype) if k in found else x
        out = jax.tree.unflatten(treedef, [own(k, x) for k, x in enumerate(leaves)])
        return meshes.laid_like(out, v)

    def _check_tree(self, leaves: list[Any]) -> None:
        shapes = tuple(jnp.shape(x) for x in leaves)
        if shapes != self.structure.shapes:
            raise ValueError(
                "Kronecker factors act on trees with the structure of the parameters, with arrays "
                f"of shapes {list(map(list, self.structure.shapes))}, and received "
                f"{list(map(list, shapes))}. Build the vector from the parameters with "
                "`jax.tree.map`."
            )

    def _check_style(self, style: str, damping: Any) -> None:
        if style not in STYLES:
            raise ValueError(f"`solve(style=)` is one of {STYLES}, and is {style!r}.")
        if style == "heuristic" and isinstance(damping, numbers.Real) and damping <= 0:
            raise ValueError(
                "`solve(style='heuristic')` damps each factor by a share of √damping, and got "
                f"{damping}, with which a singular factor has no inverse. Pass a positive "
                "`damping`, or `style='exact'`."
            )

    @abc.abstractmethod
    def _product(self, k: int, matrices: list[jax.Array]) -> list[jax.Array]: ...

    @abc.abstractmethod
    def _scaled(
        self, k: int, matrices: list[jax.Array], by: Callable[[jax.Array], jax.Array]
    ) -> list[jax.Array]: ...

    @abc.abstractmethod
    def _heuristic(self, k: int, matrices: list[jax.Array], damping: Any) -> list[jax.Array]: ...
