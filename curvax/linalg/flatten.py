"""Trees as flat vectors, and linear maps of trees as matrices."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec as P

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Matvec


def ravel(tree: Tree) -> jax.Array:
    """All entries of a tree in the order of `ravel_pytree`, [P], in float32 or wider.

    Sharded leaves are gathered on every device.
    """
    whole = lambda x: jax.sharding.reshard(x, P()) if trees.is_sharded(x) else x
    return ravel_pytree(jax.tree.map(lambda x: whole(trees.widen(x)), tree))[0]


def unravel(vector: jax.Array, like: Tree) -> Tree:
    """The inverse of `ravel`: a tree with the shapes, dtypes and sharding of `like`."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, vector.dtype), like)
    return trees.laid_out_like(ravel_pytree(zeros)[1](vector), like)


def materialize(product: Matvec, like: Tree, *, chunk: int | None = None) -> jax.Array:
    """The matrix of a linear map, for small models.

    Args:
        product: v ↦ C v.
        like: a tree of arrays or of `jax.ShapeDtypeStruct` with the structure, shapes and dtypes
            of v; P entries in all.
        chunk: columns computed in parallel; None for 16, or for 1 if a leaf is sharded on an
            explicit mesh.

    Returns:
        C, [P, P], in float32 or wider, with rows and columns in the order of
        `jax.flatten_util.ravel_pytree(like)`. For a map to other trees, [entries of C v, P].

    Raises:
        TypeError, ValueError: `chunk` is not a positive integer, or `like` is complex.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> product = lambda v: {"a": 2 * v["a"], "b": v["a"] + v["b"]}
        >>> curvax.materialize(product, {"a": jnp.zeros(()), "b": jnp.zeros(())}).tolist()
        [[2.0, 0.0], [1.0, 1.0]]
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
