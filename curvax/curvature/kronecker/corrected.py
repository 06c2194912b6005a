"""Factors with corrected eigenvalues (E-KFAC): the exact diagonal in the factors' eigenbasis."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.curvature.kronecker.cells import Eigen
from curvax.curvature.kronecker.cotangents import columns, draws_of
from curvax.curvature.kronecker.operator import BlockOperator, Structure
from curvax.curvature.kronecker.options import check_draws, required
from curvax.curvature.kronecker.statistics import Rows, cotangents_of, halves, inputs_of_blocks
from curvax.curvature.kronecker.tapped import tapped
from curvax.curvature.kronecker.taps import Arrays
from curvax.devices import axes, meshes
from curvax.devices.axes import AxisNames
from curvax.objective import Objective, microbatch_mean

Values = tuple[tuple[jax.Array, ...], ...]
"""E of every block, and of its bias if that is apart."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CorrectedFactors(BlockOperator):
    """The matrix Q_G ⊗ Q_A diag(E) (Q_G ⊗ Q_A)ᵀ of every kernel, and a diagonal for the rest.

    `KroneckerFactors.corrected` corrects E; in `KroneckerFactors.eigen` it is that of the factors.

    Attributes:
        bases: the eigenvectors and eigenvalues of each block, and of its bias if that is apart.
        diagonals: the diagonal of every other parameter, by its number.
        structure: which parameter is in which block.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> batch = {"x": jnp.array([[1.0, 0.0], [0.0, 2.0]]), "y": jnp.zeros((2, 1))}
        >>> predict = lambda w, batch: batch["x"] @ w
        >>> objective = curvax.Objective(curvax.gaussian("y"), batch, model=predict)
        >>> w = jnp.ones((2, 1))
        >>> corrected = curvax.kronecker_factors(objective, w).corrected(objective, w)
        >>> corrected(w)[:, 0].round(3).tolist()  # E[x xᵀ] w
        [0.5, 2.0]
    """

    bases: tuple[tuple[Eigen, ...], ...]
    diagonals: dict[int, jax.Array]
    structure: Structure = dataclasses.field(metadata={"static": True})

    def eigen(self) -> "CorrectedFactors":
        """This matrix, which is given by its eigenvectors."""
        return self

    def inverse(self, damping: Any) -> "CorrectedFactors":
        """Raises an error: corrected eigenvalues have no factors to invert."""
        raise ValueError(
            "`style='heuristic'` damps and inverts factors, and corrected eigenvalues have none. "
            "Use `style='exact'`."
        )

    def into(self, v: Tree) -> Tree:
        """Q_Gᵀ V Q_A of every kernel: a tree like the parameters in the eigenbasis."""
        turn = lambda k, ms: [eigen.into(m) for eigen, m in zip(self.bases[k], ms)]
        return self._applied(v, turn, jnp.ones_like)

    def out_of(self, v: Tree) -> Tree:
        """Q_G V Q_Aᵀ of every kernel, the inverse of `into`."""
        turn = lambda k, ms: [eigen.out_of(m) for eigen, m in zip(self.bases[k], ms)]
        return self._applied(v, turn, jnp.ones_like)

    def diagonal(self, like: Tree) -> Tree:
        """The eigenvalues E as a tree like the parameters, in the places of the eigenbasis.

        Args:
            like: a tree like the parameters, of which only the structure is used.
        """
        wide = jax.tree.map(trees.widen, like)
        values = lambda k, ms: [eigen.values for eigen in self.bases[k]]
        return self._applied(jax.tree.map(jnp.ones_like, wide), values, lambda d: d)

    def with_diagonal(self, diagonal: Tree) -> "CorrectedFactors":
        """The same eigenvectors with other eigenvalues, a tree as that of `diagonal`."""
        leaves = jax.tree.leaves(meshes.gathered(diagonal))
        self._check_tree(leaves)
        new = [self.structure.matrices(block, leaves) for block in self.structure.blocks]
        bases = tuple(
            tuple(eigen._replace(values=e) for eigen, e in zip(own, values))
            for own, values in zip(self.bases, new)
        )
        return CorrectedFactors(bases, {k: leaves[k] for k in self.diagonals}, self.structure)

    def trace(self) -> jax.Array:
        """tr C, a scalar."""
        blocks = [eigen.trace() for own in self.bases for eigen in own]
        return sum([*blocks, *map(jnp.sum, self.diagonals.values())], jnp.zeros(()))

    def eigenvalues(self) -> dict[str, jax.Array]:
        names, found = self.structure.names, dict[str, jax.Array]()
        for block, (own, *bias) in zip(self.structure.blocks, self.bases):
            found[names[block.leaf]] = own.values.reshape(*own.values.shape[:-2], -1)
            if bias and block.bias is not None:
                found[names[block.bias]] = bias[0].values[..., 0]
        found |= {names[leaf]: d.reshape(-1) for leaf, d in self.diagonals.items()}
        return {name: -jnp.sort(-e, axis=-1) for name, e in found.items()}

    def _product(self, k: int, matrices: list[jax.Array]) -> list[jax.Array]:
        return [eigen.product(v) for eigen, v in zip(self.bases[k], matrices)]

    def _scaled(
        self, k: int, matrices: list[jax.Array], by: Callable[[jax.Array], jax.Array]
    ) -> list[jax.Array]:
        return [eigen.scaled(v, by(eigen.values)) for eigen, v in zip(self.bases[k], matrices)]

    def _heuristic(self, k: int, matrices: list[jax.Array], damping: Any) -> list[jax.Array]:
        del k, matrices
        self.inverse(damping)
        return []


def corrections(
    factors: Any,
    objective: Objective,
    params: Tree,
    labels: jax.Array | None,
    key: jax.Array | None,
    mean_over: AxisNames,
    where: str = "KroneckerFactors.corrected",
) -> CorrectedFactors:
    """`factors.corrected(objective, params, ...)`; `where` is named in errors."""
    fisher = factors.structure.options.fisher
    check_draws(fisher, labels, key, where)
    objective = required(objective, params, fisher, where)
    over = checks.averaged_axes(mean_over, objective.local_axes(params), stage=where)
    draws = draws_of(objective, fisher, labels, key)
    with jax.default_matmul_precision("highest"):
        bases = factors.eigen().bases
        own = lambda part, *draws: _values(part, params, factors.structure, bases, draws)
        values = microbatch_mean(objective, own, *draws, aux=False)
        values = axes.mean(values, over, objective.batch_weight())
    replaced = tuple(
        tuple(eigen._replace(values=e.reshape(eigen.values.shape)) for eigen, e in zip(own, new))
        for own, new in zip(bases, values)
    )
    return CorrectedFactors(replaced, factors.diagonals, factors.structure)


def _values(
    part: Objective, params: Tree, structure: Structure, bases: Any, draws: tuple[Any, ...]
) -> Values:
    """E on a part of the batch: the squares of the gradients of examples in the eigenbases."""
    at = tapped(part, params)
    if at.plan.blocks != structure.blocks:
        raise ValueError(
            "Eigenvalues of Kronecker factors are corrected by the model that the factors are of, "
            "and these have other kernels, or divide their axes differently. Factors of "
            "`gradient_kronecker` are of no model: take `in_eigenbasis(squared_gradient() | ...)` "
            "behind it, or `fisher_kronecker` before."
        )
    rows = inputs_of_blocks(at.plan, at.seen, at.sites, part.size, structure.joint)
    uses = halves(at.plan)

    def of_column(pulled: Arrays, loose: list[jax.Array]) -> Values:
        found = []
        for k, own in enumerate(uses):
            pairs = [(x, cotangents_of(half, pulled)) for x, half in zip(rows[k], own)]
            found.append(tuple(_squares(eigen, pairs, n) for n, eigen in enumerate(bases[k])))
        return tuple(found)

    return at.total(columns(part, at.outputs, structure.options.fisher, *draws), of_column)


def _squares(eigen: Eigen, pairs: list[tuple[Rows, jax.Array]], number: int) -> jax.Array:
    """Σ_n (Q_Gᵀ (Σ_s g aᵀ) Q_A)², [layers, outputs, inputs].

    Args:
        eigen: the basis of a block, or of its bias.
        pairs: activations and cotangents, of the uses as they are and of those exchanged.
        number: 1 for a bias that is apart, whose activations are 1.
    """
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[-2:]), eigen)
    (rows, g), *exchanged = pairs
    if number == 1:
        left = jnp.sum(jnp.einsum("lnpo,loq->lnpq", g, flat.left), axis=2)
        return jnp.sum(jnp.square(left), axis=1)[..., None]
    left = jnp.einsum("lnpo,loq->lnpq", g, flat.left)
    if flat.right is None:
        return _over_examples(lambda left, ids: _table(left, ids, rows.table), left, rows.values)
    right = _turned(rows, flat.right)
    if exchanged:
        ((rows, g),) = exchanged
        left = jnp.concatenate([left, _turned(rows, flat.left)], axis=2)
        right = jnp.concatenate([right, jnp.einsum("lnpi,lij->lnpj", g, flat.right)], axis=2)
    if left.shape[2] == 1:
        return jnp.einsum("lnpo,lnpi->loi", jnp.square(left), jnp.square(right))
    product = lambda left, right: jnp.square(jnp.einsum("lpo,lpi->loi", left, right))
    return _over_examples(product, left, right)


def _turned(rows: Rows, basis: jax.Array) -> jax.Array:
    """Activations in a basis; the rows of the basis for numbers of rows."""
    if rows.table:
        return jax.vmap(lambda q, ids: q[ids])(basis, rows.values)
    return jnp.einsum("lnpi,lij->lnpj", rows.values, basis)


def _table(left: jax.Array, ids: jax.Array, size: int) -> jax.Array:
    """The squared gradient of one example in a table, [layers, outputs, rows]."""
    one = lambda g, i: jnp.zeros((size, g.shape[-1]), g.dtype).at[i].add(g)
    return jnp.square(jnp.swapaxes(jax.vmap(one)(left, ids), 1, 2))


def _over_examples(f: Any, *xs: jax.Array) -> jax.Array:
    """Σ_n f of arrays [layers, n, ...], one example at a time."""
    first = [x[:, 0] for x in xs]
    own = jax.eval_shape(f, *first)
    add = lambda total, x: total + f(*x)
    start = axes.carried(jnp.zeros(own.shape, own.dtype), lambda total: add(total, first))
    moved = [jnp.moveaxis(x, 1, 0) for x in xs]
    return lax.scan(lambda total, x: (add(total, x), None), start, moved)[0]
