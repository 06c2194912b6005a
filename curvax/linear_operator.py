"""A symmetric linear map v ↦ C v on trees, with its damping and, where known, its square root."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvax.arithmetic import safe_math, trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Matvec, Scalar
from curvax.devices import axes


class Root(NamedTuple):
    """A factor R with C = RᵀR, which maps parameters to rows, such as the outputs of a batch."""

    forward: Matvec
    """v ↦ R v."""
    transpose: Matvec
    """u ↦ Rᵀ u."""
    rows: Tree
    """A tree of `jax.ShapeDtypeStruct`, shaped like R v."""


@dataclasses.dataclass(frozen=True)
class Product:
    """A symmetric linear map v ↦ (C + λI) v, callable on trees shaped like the parameters.

    Attributes:
        curvature: v ↦ C v, without the damping.
        root: R with C = RᵀR, or None if it is not known. `row_space` needs it.
        damping: λ, or None for 0.
        over: device axes over which C has been averaged.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> product = curvax.Product(lambda v: jnp.array([1.0, 4.0]) * v)
        >>> product.damped(0.5)(jnp.ones(2)).tolist()
        [1.5, 4.5]
    """

    curvature: Matvec
    root: Root | None = None
    damping: Scalar | None = None
    over: tuple[axes.Along, ...] = ()

    def __call__(self, v: Tree) -> Tree:
        cv = self.curvature(v)
        return cv if self.damping is None else trees.add_scaled(cv, self.damping, v)

    def damped(self, damping: Scalar) -> "Product":
        """The product with more damping, v ↦ (C + (λ + damping) I) v.

        Args:
            damping: a number or a scalar array, in the units of C.
        """
        total = damping if self.damping is None else self.damping + damping
        return dataclasses.replace(self, damping=total)

    def averaged(self, over: tuple[axes.Along, ...], weight: jax.Array | None = None) -> "Product":
        """The weighted mean of C over bound device axes.

        Args:
            over: device axes.
            weight: the weight of this device, a scalar; None if all devices count equally.

        Returns:
            A product whose root has the rows of all devices.
        """
        if not over:
            return self
        return dataclasses.replace(
            self,
            curvature=lambda v: axes.mean(self.curvature(v), over, weight),
            root=None if self.root is None else _gathered(self.root, over, weight),
            over=over,
        )

    def gram(self, *vectors: Tree) -> jax.Array:
        """The matrix of the numbers uᵀ (C + λI) v of some vectors.

        Where the root is known, and not spread over devices, by a forward pass for each vector.
        """
        stacked = lambda left, right: jnp.stack(
            [jnp.stack([trees.dot(u, v) for v in right]) for u in left]
        )
        if self.root is None or self.over:
            return stacked(vectors, [self(v) for v in vectors])
        rows = [self.root.forward(v) for v in vectors]
        found = stacked(rows, rows)
        return found if self.damping is None else found + self.damping * stacked(vectors, vectors)

    def form(self, v: Tree) -> jax.Array:
        """vᵀ C v, without the damping."""
        return dataclasses.replace(self, damping=None).gram(v)[0, 0]

    def within(self, into: Matvec, out_of: Matvec) -> "Product":
        """The product v ↦ Pᵀ C P v, a diagonal block of C for example.

        Args:
            into: v ↦ P v.
            out_of: u ↦ Pᵀ u.
        """
        root = self.root
        if root is not None:
            forward, transpose, rows = root
            root = Root(lambda v: forward(into(v)), lambda u: out_of(transpose(u)), rows)
        curvature = lambda v: out_of(self.curvature(into(v)))
        return dataclasses.replace(self, curvature=curvature, root=root)


def as_product(matvec: Matvec) -> Product:
    """Converts a callable v ↦ C v to a `Product`."""
    return matvec if isinstance(matvec, Product) else Product(matvec)


def _gathered(root: Root, over: tuple[axes.Along, ...], weight: jax.Array | None) -> Root:
    """The root of Σ_d w_d R_dᵀR_d, Σ w_d = 1: rows of all devices along a new first axis."""
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
