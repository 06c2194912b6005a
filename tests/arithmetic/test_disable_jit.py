"""Tree arithmetic under `jax.disable_jit`, in which loops over whole data sets run."""

import jax
import jax.numpy as jnp
import pytest
from small_problems import assert_trees_close

from curvax.arithmetic import trees

A = {"w": jnp.array([[3.0, -4.0], [0.0, 2.0]]), "b": jnp.array([1.0, 0.5])}
B = {"w": jnp.array([[1.0, 2.0], [-1.0, 0.5]]), "b": jnp.array([0.0, -2.0])}
CALLS = {
    "add_scaled": lambda: trees.add_scaled(A, -0.5, B),
    "scale": lambda: trees.scale(jnp.array(3.0), A),
    "dot": lambda: trees.dot(A, B),
    "norm": lambda: trees.norm(A),
    "unit": lambda: trees.unit(A),
    "cosine": lambda: trees.cosine(A, B),
    "gradient of norm": lambda: jax.grad(trees.norm)(A),
}


@pytest.mark.parametrize("name", CALLS)
def test_results_are_those_with_jit(name):
    with jax.disable_jit():
        found = CALLS[name]()
    assert_trees_close(found, CALLS[name](), tol=1e-15)


def test_a_function_of_trees_is_one_program_and_traced_once():
    traced = []

    def double(tree):
        traced.append(isinstance(tree["b"], jax.core.Tracer))
        return jax.tree.map(lambda x: 2 * x, tree)

    at_once = trees._at_once(double)
    with jax.disable_jit():
        first, second = at_once(A), at_once(B)
    assert_trees_close((first, second), (double(A), double(B)))
    assert traced == [True, False, False]
