"""Programs grow in proportion to the number of leaves, not to its square."""

import jax
import jax.numpy as jnp

from curvax.arithmetic import trees


def lines_of_program(leaves):
    tree = {f"{i}": jax.ShapeDtypeStruct((8, 8), jnp.float32) for i in range(leaves)}
    f = lambda a, b: (trees.unit(a), trees.reject(a, b))
    return (jax.jit(f).lower(tree, tree).compile().as_text() or "").count("\n")


def test_program_of_norms_and_projections_is_linear_in_the_leaves():
    few, some, many = map(lines_of_program, (16, 32, 64))
    assert many - some < 2.1 * (some - few)
