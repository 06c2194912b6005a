"""Products, solutions and powers with one Kronecker product G ⊗ A, and in its eigenbasis."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax.arithmetic import trees
from curvax.linalg import decompositions


class Cell(NamedTuple):
    """G ⊗ A, acting on matrices V [..., outputs, inputs] as G V A."""

    inputs: jax.Array
    """A, [..., inputs, inputs], or its diagonal [..., inputs]."""
    outputs: jax.Array
    """G, [..., outputs, outputs]."""

    @property
    def is_table(self) -> bool:
        return self.inputs.ndim < self.outputs.ndim

    def product(self, v: jax.Array) -> jax.Array:
        """G V A"""
        left = self.outputs @ v
        return left * self.inputs[..., None, :] if self.is_table else left @ self.inputs

    def trace(self) -> jax.Array:
        return jnp.sum(self.input_trace() * _trace(self.outputs))

    def finite(self) -> tuple[jax.Array, jax.Array]:
        """Whether A and G are finite, from their diagonals."""
        of = lambda x, table: jnp.all(
            jnp.isfinite(x if table else jnp.diagonal(x, axis1=-2, axis2=-1))
        )
        return of(self.inputs, self.is_table), of(self.outputs, False)

    def input_trace(self) -> jax.Array:
        return jnp.sum(self.inputs, axis=-1) if self.is_table else _trace(self.inputs)

    def pi(self) -> jax.Array:
        """π = √((tr A / dim A) / (tr G / dim G)), [...], and 1 where either factor is 0."""
        a = self.input_trace() / self.inputs.shape[-1]
        g = _trace(self.outputs) / self.outputs.shape[-1]
        fine = (a > 0) & (g > 0)
        return jnp.sqrt(jnp.where(fine, a, 1) / jnp.where(fine, g, 1))

    def matrices(self) -> list[jax.Array]:
        """[G, A], or [G] if A is a diagonal."""
        return [self.outputs] if self.is_table else [self.outputs, self.inputs]

    def eigen(self, pairs: Iterator[tuple[jax.Array, ...]]) -> "Eigen":
        """The eigenvectors and eigenvalues of G ⊗ A, from those of `matrices`."""
        g, left = next(pairs)
        a, right = (self.inputs, None) if self.is_table else next(pairs)
        return Eigen(left, right, jnp.maximum(g, 0)[..., :, None] * jnp.maximum(a, 0)[..., None, :])

    def damped(self, damping: Any) -> "Cell":
        """(G + √λ/π I) ⊗ (A + √λ π I)"""
        root, pi = jnp.sqrt(damping), self.pi()
        outputs = _damped(self.outputs, root / pi)
        if self.is_table:
            return Cell(self.inputs + (root * pi)[..., None], outputs)
        return Cell(_damped(self.inputs, root * pi), outputs)

    def inverse(self, inverses: Iterator[jax.Array]) -> "Cell":
        """G⁻¹ ⊗ A⁻¹, from those of `matrices`."""
        outputs = next(inverses)
        return Cell(1 / self.inputs if self.is_table else next(inverses), outputs)

    def heuristic(self, v: jax.Array, damping: Any) -> jax.Array:
        """(G + √λ/π I)⁻¹ V (A + √λ π I)⁻¹, by Cholesky factors."""
        root, pi = jnp.sqrt(damping), self.pi()
        v = solved(self.outputs, root / pi, v)
        if self.is_table:
            return v / (self.inputs + (root * pi)[..., None])[..., None, :]
        return jnp.swapaxes(solved(self.inputs, root * pi, jnp.swapaxes(v, -1, -2)), -1, -2)

    def bias_heuristic(self, b: jax.Array, damping: Any) -> jax.Array:
        """(G + √λ/π I)⁻¹ b for a bias apart from this kernel, whose own A is 1."""
        return solved(self.outputs, jnp.sqrt(damping) / self.pi(), b)


class Eigen(NamedTuple):
    """Q_G diag(E) Q_Aᵀ: a matrix G ⊗ A, or a better one in its eigenbasis."""

    left: jax.Array
    """Q_G, [..., outputs, outputs]."""
    right: jax.Array | None
    """Q_A, [..., inputs, inputs]; None for the identity."""
    values: jax.Array
    """E, [..., outputs, inputs]."""

    def into(self, v: jax.Array) -> jax.Array:
        """Q_Gᵀ V Q_A"""
        v = jnp.swapaxes(self.left, -1, -2) @ v
        return v if self.right is None else v @ self.right

    def out_of(self, v: jax.Array) -> jax.Array:
        """Q_G V Q_Aᵀ"""
        v = self.left @ v
        return v if self.right is None else v @ jnp.swapaxes(self.right, -1, -2)

    def scaled(self, v: jax.Array, by: jax.Array) -> jax.Array:
        """Q_G (by ∘ Q_Gᵀ V Q_A) Q_Aᵀ"""
        return self.out_of(by * self.into(v))

    def product(self, v: jax.Array) -> jax.Array:
        return self.scaled(v, self.values)

    def trace(self) -> jax.Array:
        return jnp.sum(self.values)


def powers(values: jax.Array, exponent: Any, damping: Any) -> jax.Array:
    """(E + λ)^exponent; without damping, a negative power of a vanishing eigenvalue is 0.

    An eigenvalue vanishes if it is within rounding of 0 relative to the largest.
    """
    rounding = jnp.finfo(values.dtype).eps * max(values.shape[-2:], default=1)
    vanish = values <= rounding * jnp.max(values, axis=(-2, -1), keepdims=True)
    drop = vanish & (jnp.asarray(exponent) < 0) & (jnp.asarray(damping) == 0)
    return jnp.where(drop, 0, jnp.where(drop, 1, values + damping) ** exponent)


def iterated(pairs: Sequence[tuple[jax.Array, jax.Array]]) -> list[jax.Array]:
    """Q ← the orthogonal factor of M Q, for symmetric M [..., d, d] and Q with d columns.

    Columns are made orthogonal in the order of the eigenvalues qᵀMq, the largest first, and stay
    in their places.
    """
    take = lambda x, places: jnp.take_along_axis(x, places[..., None, :], axis=-1)
    products = [m @ q for m, q in pairs]
    orders = [
        jnp.argsort(-jnp.sum(q * product, axis=-2), axis=-1)
        for (_, q), product in zip(pairs, products)
    ]
    found = decompositions.orthogonal_factors(*map(take, products, orders))
    return [take(q, jnp.argsort(order, axis=-1)) for q, order in zip(found, orders)]


def solved(matrix: jax.Array, damping: jax.Array, v: jax.Array) -> jax.Array:
    """(M + damping·I)⁻¹ V for positive semi-definite matrices [..., d, d]."""
    return decompositions.cholesky_solved(_damped(matrix, damping), v)


def _damped(matrix: jax.Array, damping: jax.Array) -> jax.Array:
    floor = jnp.finfo(matrix.dtype).eps * _trace(matrix)
    shift = jnp.broadcast_to(jnp.maximum(damping, floor)[..., None], matrix.shape[:-1])
    return matrix + _diagonal(shift)


def combined(cells: list[Cell]) -> Cell:
    """One Kronecker product for a sum of several, with the same trace.

    Each factor is a mean of the factors of trace one, weighted by the traces of the products: the
    expectation of a product is replaced by that of its factors, as within one of them.
    """
    if len(cells) == 1:
        return cells[0]
    cells = [cell._replace(inputs=_dense(cell)) for cell in cells]
    traces = [cell.input_trace() * _trace(cell.outputs) for cell in cells]
    whole = sum(traces[1:], traces[0])

    def mean(factors: list[jax.Array]) -> jax.Array:
        parts = [
            trees.ratio(share, whole * _trace(m))[..., None, None] * m
            for share, m in zip(traces, factors)
        ]
        return sum(parts[1:], parts[0])

    inputs = mean([cell.inputs for cell in cells])
    return Cell(inputs, whole[..., None, None] * mean([cell.outputs for cell in cells]))


def _dense(cell: Cell) -> jax.Array:
    return _diagonal(cell.inputs) if cell.is_table else cell.inputs


def _diagonal(entries: jax.Array) -> jax.Array:
    """The diagonal matrices [..., d, d] with these entries, [..., d]."""
    size = entries.shape[-1]
    eye = jnp.broadcast_to(jnp.eye(size, dtype=entries.dtype), (*entries.shape, size))
    return entries[..., None] * eye


def _trace(matrix: jax.Array) -> jax.Array:
    return jnp.trace(matrix, axis1=-2, axis2=-1)
