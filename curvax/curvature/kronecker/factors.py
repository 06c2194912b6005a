"""The factored matrix: G ⊗ A for every kernel, and a diagonal for the rest."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax.arithmetic.trees import Tree
from curvax.curvature.kronecker.cells import Cell, Eigen, iterated
from curvax.curvature.kronecker.corrected import CorrectedFactors, corrections
from curvax.curvature.kronecker.operator import BlockOperator, Structure
from curvax.devices.axes import AxisNames
from curvax.linalg import decompositions
from curvax.objective import Objective


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KroneckerFactors(BlockOperator):
    """The matrix G ⊗ A of every kernel, and the diagonal of other parameters.

    `kronecker_factors` computes it. A linear operator, `factors(v)`, and a pytree of its arrays, so
    that it can leave `jax.jit`, be averaged and be saved.

    Attributes:
        inputs: A of each block, [*layers, inputs, inputs], or its diagonal, [*layers, inputs].
        outputs: G of each block, [*layers, outputs, outputs].
        diagonals: the diagonal of every other parameter, by its number.
        structure: which parameter is in which block, and how its axes are divided.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> batch = {"x": jnp.array([[1.0, 0.0], [0.0, 2.0]]), "y": jnp.zeros((2, 1))}
        >>> predict = lambda p, batch: batch["x"] @ p["w"] * p["scale"][None]
        >>> objective = curvax.Objective(curvax.gaussian("y"), batch, model=predict)
        >>> params = {"w": jnp.ones((2, 1)), "scale": jnp.ones(1)}
        >>> factors = curvax.kronecker_factors(objective, params)
        >>> inputs, outputs = factors.factors_of("w")
        >>> inputs.round(3).tolist(), outputs.round(3).tolist()
        ([[0.5, 0.0], [0.0, 2.0]], [[1.0]])
        >>> {name: line.treatment for name, line in factors.report().items()}
        {'scale': 'diagonal', 'w': 'kronecker'}
        >>> round(float(factors.trace()), 3)  # 2.5 of w, and E[(x w)²] = 2.5 of the scale
        5.0
    """

    inputs: tuple[jax.Array, ...]
    outputs: tuple[jax.Array, ...]
    diagonals: dict[int, jax.Array]
    structure: Structure = dataclasses.field(metadata={"static": True})

    def cells(self, k: int) -> list[Cell]:
        """G ⊗ A of block k, and G ⊗ 1 of its bias if that is apart."""
        cell = Cell(self.inputs[k], self.outputs[k])
        if self.structure.joint or self.structure.blocks[k].bias is None:
            return [cell]
        ones = jnp.ones((*cell.outputs.shape[:-2], 1, 1), cell.outputs.dtype)
        return [cell, Cell(ones, cell.outputs)]

    def factors_of(self, name: str) -> tuple[jax.Array, jax.Array]:
        """(A, G) of a kernel.

        Args:
            name: its path, as in `report()`.

        Raises:
            KeyError: it has no factors.
        """
        leaf = self.structure.names.index(name) if name in self.structure.names else None
        for k, block in enumerate(self.structure.blocks):
            if block.leaf == leaf:
                return self.inputs[k], self.outputs[k]
        have = [self.structure.names[block.leaf] for block in self.structure.blocks]
        raise KeyError(f"`{name}` has no Kronecker factors; {have} have.")

    def corrected(
        self,
        objective: Objective,
        params: Tree,
        *,
        labels: jax.Array | None = None,
        key: jax.Array | None = None,
        mean_over: AxisNames = None,
    ) -> CorrectedFactors:
        """The same eigenvectors with the exact diagonal in their basis as eigenvalues (E-KFAC).

            E = E[(Q_Gᵀ (Σ_s g aᵀ) Q_A)²]

        George et al., arXiv:1806.03884. With either `sharing` the positions of an example are
        summed, so that the trace is that of the blocks of the Fisher matrix.

        Args:
            objective: the loss, on this batch or another.
            params: the point θ.
            labels, key, mean_over: as in `kronecker_factors`.

        Raises:
            ValueError: as in `kronecker_factors`.
        """
        return corrections(self, objective, params, labels, key, mean_over)

    def finite(self) -> "KroneckerFactors":
        """For each array whether all of it is finite, a bool scalar in its place.

        A mean of outer products is finite where its diagonal is, so that only that is read.
        """
        cells = [self.cells(k)[0].finite() for k in range(len(self.inputs))]
        inputs, outputs = (tuple(x) for x in zip(*cells)) if cells else ((), ())
        diagonals = {leaf: jnp.all(jnp.isfinite(d)) for leaf, d in self.diagonals.items()}
        return dataclasses.replace(self, inputs=inputs, outputs=outputs, diagonals=diagonals)

    def is_zero(self) -> jax.Array:
        """Whether the matrix is 0, a bool scalar; of a Kronecker product from its trace."""
        traces = [cell.trace() for k in range(len(self.inputs)) for cell in self.cells(k)]
        zero = [jnp.all(x == 0) for x in (*traces, *self.diagonals.values())]
        return jnp.all(jnp.array(zero))

    def eigen(self) -> CorrectedFactors:
        """The same matrix by its eigenvectors and eigenvalues, from one decomposition."""
        cells = self._all_cells()
        pairs = iter(decompositions.eigh(*(m for own in cells for x in own for m in x.matrices())))
        bases = tuple(tuple(self._eigenvalues(cell.eigen(pairs)) for cell in own) for own in cells)
        return CorrectedFactors(bases, self.diagonals, self.structure)

    def _all_cells(self) -> list[list[Cell]]:
        return [self.cells(k) for k in range(len(self.inputs))]

    def _eigenvalues(self, eigen: Eigen) -> Eigen:
        """This block by its eigenvectors, from G ⊗ A by them."""
        return eigen

    def eigen_from(self, basis: CorrectedFactors) -> CorrectedFactors:
        """An approximation of `eigen` from an earlier basis, by one step of subspace iteration.

        Its eigenvalues are those of the earlier basis.
        """
        own = [eigen for block in basis.bases for eigen in block]
        cells = [cell for block in self._all_cells() for cell in block]
        pairs = [(cell.outputs, eigen.left) for cell, eigen in zip(cells, own)]
        pairs += [(cell.inputs, e.right) for cell, e in zip(cells, own) if e.right is not None]
        found = iterated(pairs)
        lefts, rights = iter(found[: len(own)]), iter(found[len(own) :])
        turn = lambda e: Eigen(next(lefts), None if e.right is None else next(rights), e.values)
        bases = tuple(tuple(map(turn, block)) for block in basis.bases)
        return CorrectedFactors(bases, self.diagonals, self.structure)

    def inverse(self, damping: Any) -> "KroneckerFactors":
        """The inverses of the damped factors: the product with them is `solve(style="heuristic")`.

        Args:
            damping: λ > 0, in the units of C.

        Raises:
            ValueError: λ is not positive.
        """
        self._check_style("heuristic", damping)
        damped = [self.cells(k)[0].damped(damping) for k in range(len(self.inputs))]
        found = iter(decompositions.inverses(*(m for cell in damped for m in cell.matrices())))
        inverted = [cell.inverse(found) for cell in damped]
        inputs, outputs = (tuple(x) for x in zip(*inverted)) if inverted else ((), ())
        diagonals = {leaf: 1 / (d + damping) for leaf, d in self.diagonals.items()}
        return KroneckerFactors(inputs, outputs, diagonals, self.structure)

    def trace(self) -> jax.Array:
        """tr C = Σ tr A tr G, and the sums of the diagonals; a scalar."""
        blocks = [cell.trace() for k in range(len(self.inputs)) for cell in self.cells(k)]
        return sum([*blocks, *map(jnp.sum, self.diagonals.values())], jnp.zeros(()))

    def eigenvalues(self) -> dict[str, jax.Array]:
        return self.eigen().eigenvalues()

    def _product(self, k: int, matrices: list[jax.Array]) -> list[jax.Array]:
        return [cell.product(v) for cell, v in zip(self.cells(k), matrices)]

    def _scaled(
        self, k: int, matrices: list[jax.Array], by: Callable[[jax.Array], jax.Array]
    ) -> list[jax.Array]:
        cells = self.cells(k)
        pairs = iter(decompositions.eigh(*(m for cell in cells for m in cell.matrices())))
        own = [self._eigenvalues(cell.eigen(pairs)) for cell in cells]
        return [eigen.scaled(v, by(eigen.values)) for eigen, v in zip(own, matrices)]

    def _heuristic(self, k: int, matrices: list[jax.Array], damping: Any) -> list[jax.Array]:
        cell, *_ = self.cells(k)
        v, *apart = matrices
        return [cell.heuristic(v, damping), *(cell.bias_heuristic(b, damping) for b in apart)]
