"""A loss, a point and blocks of parameters ↦ the extreme eigenvalue of each diagonal block."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from curvax import checks
from curvax.analysis.blocks import Blocks, block_masks
from curvax.analysis.curvature_products import CurvatureLike, Matrix, matrix
from curvax.analysis.dataset_loss import DatasetLoss
from curvax.analysis.evaluation import Loss, evaluate_products
from curvax.analysis.spectra import start_vector, tolerance
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Key
from curvax.devices.axes import AxisNames
from curvax.linalg import eigenpairs
from curvax.linalg.probes import as_key
from curvax.objective import Objective


class BlockEigenvalue(NamedTuple):
    """Result of `block_eigenvalues`: an extreme eigenvalue of one diagonal block, and its error."""

    value: jax.Array
    """λ, scalar."""
    residual: jax.Array
    """‖C v - λ v‖ within the block, scalar: a bound on the distance to an eigenvalue of it."""
    converged: jax.Array
    """residual <= tol·max|λ|, boolean scalar."""


def block_eigenvalues(
    objective: Loss,
    params: Tree,
    blocks: Blocks = "*",
    *,
    curvature: CurvatureLike = "hessian",
    mode: str = "auto",
    end: str = "largest",
    tol: float | None = None,
    max_products: int = 1000,
    subspace: int | None = None,
    chunk: int = 4,
    v0: Tree = None,
    key: Key = 0,
    mean_over: AxisNames = None,
) -> dict[str, BlockEigenvalue]:
    """Computes λ_max of the diagonal block of the curvature for each block of parameters.

        λ_max(M_b C M_b),   M_b the projection onto the parameters of block b

    The loss is linearised once. Lanczos runs on `chunk` masked vectors at a time, whose products
    form one batched product; over a `DatasetLoss` the blocks follow one another. Chen, Hsieh &
    Gong, arXiv:2106.01548, Table 3.

    Args:
        objective: an `Objective`, a `DatasetLoss`, or a callable `params -> scalar`.
        params: the point θ.
        blocks: one of three forms. A layout, `curvax.layout(model, variables)`: all of its blocks,
            with each layer of a scanned depth as a block of its own. Patterns over paths such as
            `"block_*/attention"`, in which `*` matches (part of) one name: one block for each
            matching path, with everything below it. A mapping `{name: patterns}`: one block for
            all matches. `"*"` gives the top-level modules.
        curvature, mode: as in `top_eigenpairs`.
        end: "largest", "smallest" (most negative) or "magnitude".
        tol, max_products, subspace, v0, key: of the search in each block, as in `top_eigenpairs`.
        chunk: blocks at a time; each holds `subspace` vectors as large as the parameters.
        mean_over: device axes to average over, inside pmap or shard_map.

    Returns:
        `{block: BlockEigenvalue}`, in the order of the blocks.

    Raises:
        ValueError: a pattern without a match, the layout of another model, or an unknown option.

    Examples:
        >>> import jax.numpy as jnp
        >>> from curvax import analysis
        >>> loss = lambda p: jnp.sum(p["a"] ** 2) + 3 * jnp.sum(p["b"] ** 2)
        >>> params = {"a": jnp.ones(2), "b": jnp.ones(3)}
        >>> found = analysis.block_eigenvalues(loss, params)
        >>> {name: round(float(x.value), 3) for name, x in found.items()}
        {'a': 2.0, 'b': 6.0}
    """
    of = matrix(curvature, mean_over, "block_eigenvalues", mode)
    checks.check_count("block_eigenvalues", chunk=chunk)
    masks = block_masks(params, blocks)
    batches = -(-len(masks) // chunk)
    batch_size = -(-len(masks) // batches)
    # The last batch is padded: a shorter one would compile a second program.
    padded = [list(masks.values())[n % len(masks)] for n in range(batches * batch_size)]
    found = evaluate_products(
        _search_blocks, objective, params, jax.tree.map(lambda *x: np.stack(x), *padded), v0,
        as_key(key), of=of, batch_size=batch_size, end=end, max_products=max_products,
        subspace=subspace, tol=tolerance(params) if tol is None else tol,
    )  # fmt: skip
    return {name: jax.tree.map(lambda x, n=n: x[n], found) for n, name in enumerate(masks)}


def _search_blocks(
    objective: Objective | DatasetLoss,
    params: Tree,
    masks: Tree,
    v0: Tree,
    key: jax.Array,
    *,
    of: Matrix,
    batch_size: int,
    **options: Any,
) -> BlockEigenvalue:
    product, start = of.at(objective, params), start_vector(v0, key, params)

    def search(mask: Tree) -> BlockEigenvalue:
        inside = lambda v: jax.tree.map(jnp.multiply, mask, v)
        v = inside(start)
        # After Lanczos has exhausted a small block, it continues in the complement. There the
        # operator is `level` times the identity, with `level` inside the spectrum of the block, so
        # that no extreme eigenvalue comes from the complement.
        level = trees.ratio(trees.dot(v, product(v)), trees.dot(v, v))
        whole = lambda m, cu, u: m * cu + level * (1 - m) * u
        block = lambda u: jax.tree.map(whole, mask, product(inside(u)), u)
        pairs = eigenpairs(block, v, **options)
        return BlockEigenvalue(pairs.values[0], pairs.residuals[0], pairs.converged[0])

    # The host loop of a `DatasetLoss` takes one vector at a time, and vectors on an explicit mesh
    # cannot be stacked.
    sharded = any(map(trees.is_sharded, jax.tree.leaves(params)))
    one_by_one = isinstance(objective, DatasetLoss) or sharded
    return lax.map(search, masks, batch_size=None if one_by_one else batch_size)
