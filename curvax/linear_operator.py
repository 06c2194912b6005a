"""A symmetric product v ↦ C v that may also know its root and its damping."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax.arithmetic import safe_math, trees
from curvax.arithmetic.trees import Tree
from curvax.devices import axes


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

    `curvature` is v ↦ C v alone, `root` its factor where there is one, `damping` the λ, and `over`
    the device axes that C is the mean over.
    """

    curvature: Callable[[Tree], Tree]
    root: Root | None = None
    damping: Any = None
    over: tuple[axes.Along, ...] = ()

    def __call__(self, v: Tree) -> Tree:
        cv = self.curvature(v)
        return cv if self.damping is None else trees.add_scaled(cv, self.damping, v)

    def damped(self, damping: Any) -> "Product":
        """v ↦ (C + (λ + damping) I) v."""
        total = damping if self.damping is None else self.damping + damping
        return dataclasses.replace(self, damping=total)

    def averaged(self, over: tuple[axes.Along, ...], weight: jax.Array | None = None) -> "Product":
        """The mean of every device's C over bound axes, by weight; its rows are those of all."""
        if not over:
            return self
        return dataclasses.replace(
            self,
            curvature=lambda v: axes.mean(self.curvature(v), over, weight),
            root=None if self.root is None else _gathered(self.root, over, weight),
            over=over,
        )

    def within(self, into: Callable[[Tree], Tree], out_of: Callable[[Tree], Tree]) -> "Product":
        """The block v ↦ Pᵀ C P v, where `into` is P and `out_of` its transpose."""
        root = self.root
        if root is not None:
            forward, transpose, rows = root
            root = Root(lambda v: forward(into(v)), lambda u: out_of(transpose(u)), rows)
        curvature = lambda v: out_of(self.curvature(into(v)))
        return dataclasses.replace(self, curvature=curvature, root=root)


def as_product(matvec: Callable[[Tree], Tree]) -> Product:
    """A plain callable v ↦ C v as a product."""
    return matvec if isinstance(matvec, Product) else Product(matvec)


def _gathered(root: Root, over: tuple[axes.Along, ...], weight: jax.Array | None) -> Root:
    """The rows of all devices along a new first axis: Σ_d w_d R_dᵀR_d, Σ w_d = 1."""
    number, devices = axes.index_and_size(over)
    share = jnp.ones(()) / devices
    if weight is not None:
        w = axes.vary(weight, over)
        share = trees.ratio(w, axes.total(w, over))
    scale = safe_math.root(share)

    def forward(v: Tree) -> Tree:
        def place(x: jax.Array) -> jax.Array:
            own = (scale * trees.widen(x)).astype(x.dtype)
            empty = axes.vary(jnp.zeros((devices, *x.shape), x.dtype), over)
            return axes.total(empty.at[number].set(own), over)

        return jax.tree.map(place, root.forward(v))

    def transpose(u: Tree) -> Tree:
        own = jax.tree.map(lambda x: axes.vary(x, over)[number], u)
        return jax.tree.map(lambda x: axes.total(x, over), root.transpose(trees.scale(scale, own)))

    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct((devices, *x.shape), x.dtype), root.rows)
    return Root(forward, transpose, rows)
