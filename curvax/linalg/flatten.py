"""Trees as flat vectors, and products on trees as matrices of them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec as P

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree


def ravel(tree: Tree) -> jax.Array:
    """All entries in the order of `ravel_pytree`, [P], in float32 or wider, on every device."""
    whole = lambda x: jax.sharding.reshard(x, P()) if trees.is_sharded(x) else x
    return ravel_pytree(jax.tree.map(lambda x: whole(trees.widen(x)), tree))[0]


def unravel(vector: jax.Array, like: Tree) -> Tree:
    """The tree shaped, typed and laid out like `like` whose entries are `vector`, [P]."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, vector.dtype), like)
    return trees.laid_out_like(ravel_pytree(zeros)[1](vector), like)


def materialize(
    product: Callable[[Tree], Tree], like: Tree, *, chunk: int | None = None
) -> jax.Array:
    """The matrix of a linear map, column by column.

    Args:
        product: v ↦ C v.
        like: a tree of arrays, or of `jax.ShapeDtypeStruct`, that says what v looks like; P
            entries in all.
        chunk: columns made at once; None for 16, or one where leaves are sharded explicitly.

    Returns:
        C, [P, P] (one row for each entry of C v), in float32 or wider, rows and columns in the
        order of `jax.flatten_util.ravel_pytree(like)`. Memory P².

    Raises:
        TypeError, ValueError: `chunk` is no positive integer; `like` is complex.
    """
    checks.refuse_complex(like, "materialize")
    leaves = jax.tree.leaves(like)
    size = sum(x.size for x in leaves)
    dtype = jnp.result_type(*{trees.wide_dtype(x.dtype) for x in leaves} or {jnp.float32})
    if chunk is None:
        chunk = 1 if any(map(trees.is_sharded, leaves)) else 16
    checks.check_count("materialize", chunk=chunk)
    column = lambda e: ravel(product(unravel(e, like)))
    return lax.map(column, jnp.eye(size, dtype=dtype), batch_size=min(chunk, size) or None).T
