"""A symmetric product v ↦ C v that may also know its root and its damping."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from curvax import trees
from curvax.trees import Tree


class Root(NamedTuple):
    """R with C = RᵀR, from the parameters to the rows: the outputs of a batch, say."""

    forward: Callable[[Tree], Tree]
    """v ↦ R v."""
    transpose: Callable[[Tree], Tree]
    """u ↦ Rᵀ u."""
    rows: Tree
    """A tree of `jax.ShapeDtypeStruct`, shaped like R v."""


@dataclasses.dataclass(frozen=True)
class Product:
    """v ↦ (C + λI) v: a callable on trees shaped like the parameters.

    `curvature` is v ↦ C v alone, `root` its factor where there is one, `damping` the λ.
    """

    curvature: Callable[[Tree], Tree]
    root: Root | None = None
    damping: Any = None

    def __call__(self, v: Tree) -> Tree:
        cv = self.curvature(v)
        return cv if self.damping is None else trees.add_scaled(cv, self.damping, v)

    def damped(self, damping: Any) -> "Product":
        """v ↦ (C + (λ + damping) I) v."""
        total = damping if self.damping is None else self.damping + damping
        return dataclasses.replace(self, damping=total)
