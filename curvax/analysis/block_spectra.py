"""A loss, a point and the blocks of a network ↦ the extreme eigenvalue of each diagonal block."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from curvax import checks
from curvax.analysis.blocks import Blocks, block_masks
from curvax.analysis.curvature_products import Curvature, Loss, Matrix, evaluate, matrix
from curvax.analysis.dataset_loss import Sweep
from curvax.analysis.spectra import start_vector, tolerance
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.devices.axes import AxisNames
from curvax.linalg import eigenpairs
from curvax.linalg.probes import as_key
from curvax.objective import Objective


class BlockEigenvalue(NamedTuple):
    """An eigenvalue of a diagonal block, and how far to trust it."""

    value: jax.Array
    """λ, scalar."""
    residual: jax.Array
    """‖C v - λ v‖ within the block: an eigenvalue of it lies this near."""
    converged: jax.Array
    """residual <= tol·max|λ|."""


def block_eigenvalues(
    objective: Loss,
    params: Tree,
    blocks: Blocks = "*",
    *,
    curvature: Curvature = "hessian",
    mode: str = "auto",
    end: str = "largest",
    tol: float | None = None,
    max_products: int = 1000,
    subspace: int | None = None,
    chunk: int = 4,
    v0: Tree = None,
    key: jax.Array | int = 0,
    mean_over: AxisNames = None,
) -> dict[str, BlockEigenvalue]:
    """λ_max of the diagonal block of the curvature that belongs to each block of the network.

    The loss is linearised once and `chunk` blocks are searched at a time, by Lanczos on masked
    vectors, whose products are one batched product; over a `Sweep` one block after another. Chen,
    Hsieh & Gong, arXiv:2106.01548, Table 3.

    Args:
        objective: an `Objective`, a `Sweep`, or a callable `params -> scalar`.
        params: the point θ.
        blocks: `curvax.layout(model, variables)`, for all blocks that it names, each layer of a
            scanned depth by itself; or patterns over paths, `"block_*/attention"`, in which `*`
            stands for (part of) one name: each path that matches, with all below it, is a block;
            or `{name: patterns}`, where all that match are one block. `"*"`: the top-level modules.
        curvature, mode: as in `top_eigenpairs`.
        end: "largest", "smallest" (most negative) or "magnitude".
        tol, max_products, subspace, v0, key: of the search in each block, as in `top_eigenpairs`.
        chunk: blocks at a time; each has vectors of its own, `subspace` times the parameters.
        mean_over: the device axes to average over, inside pmap or shard_map.

    Returns:
        `{block: BlockEigenvalue}`, in the order of the blocks.

    Raises:
        ValueError: a pattern matches nothing, the layout is that of another model, or an option
            is none of those named.
    """
    of = matrix(curvature, mean_over, "block_eigenvalues", mode)
    checks.check_count("block_eigenvalues", chunk=chunk)
    masks = block_masks(params, blocks)
    turns = -(-len(masks) // chunk)
    together = -(-len(masks) // turns)
    # Whole turns alone: a shorter last one would be a second program.
    padded = [list(masks.values())[n % len(masks)] for n in range(turns * together)]
    found = evaluate(
        _searched, objective, params, jax.tree.map(lambda *x: np.stack(x), *padded), v0,
        as_key(key), of=of, together=together, end=end, max_products=max_products,
        subspace=subspace, tol=tolerance(params) if tol is None else tol,
    )  # fmt: skip
    return {name: jax.tree.map(lambda x, n=n: x[n], found) for n, name in enumerate(masks)}


def _searched(
    objective: Objective | Sweep,
    params: Tree,
    masks: Tree,
    v0: Tree,
    key: jax.Array,
    *,
    of: Matrix,
    together: int,
    **options: Any,
) -> BlockEigenvalue:
    product, start = of.at(objective, params), start_vector(v0, key, params)

    def search(mask: Tree) -> BlockEigenvalue:
        inside = lambda v: jax.tree.map(jnp.multiply, mask, v)
        v = inside(start)
        # Where Lanczos has exhausted a small block it goes on outside of it, and must find nothing
        # there: a multiple of the identity by a number within the block's own range.
        level = trees.ratio(trees.dot(v, product(v)), trees.dot(v, v))
        whole = lambda m, cu, u: m * cu + level * (1 - m) * u
        block = lambda u: jax.tree.map(whole, mask, product(inside(u)), u)
        pairs = eigenpairs(block, v, **options)
        return BlockEigenvalue(pairs.values[0], pairs.residuals[0], pairs.converged[0])

    # A loop on the host takes one vector at a time, and vectors of an explicit mesh do not stack.
    alone = isinstance(objective, Sweep) or any(map(trees.is_sharded, jax.tree.leaves(params)))
    return lax.map(search, masks, batch_size=None if alone else together)
