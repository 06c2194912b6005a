"""Decompositions of stacks: those of their matrices, one by one in programs for the CPU."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.linalg import decompositions

STACK = jax.random.normal(jax.random.key(0), (2, 3, 5, 5))
SYMMETRIC = STACK @ jnp.swapaxes(STACK, -1, -2) + jnp.eye(5)[None, None]
FUNCTIONS: dict[str, tuple[Any, Any]] = {
    "eigenvalues": (lambda m: decompositions.eigh(m)[0], np.linalg.eigvalsh),
    "projections": (
        lambda m: jnp.square(decompositions.eigh(m)[1]),
        lambda m: np.square(np.linalg.eigh(m)[1]),
    ),
    "orthogonal factor": (
        lambda m: jnp.square(decompositions.orthogonal_factor(m)),
        lambda m: np.square(np.linalg.qr(m)[0]),
    ),
    "solutions": (
        lambda m: decompositions.cholesky_solved(m, STACK[..., :2]),
        lambda m: np.linalg.solve(m, np.asarray(STACK[..., :2])),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_stacks_have_the_decompositions_of_their_matrices(name):
    f, expected = FUNCTIONS[name]
    np.testing.assert_allclose(jax.jit(f)(SYMMETRIC), expected(np.asarray(SYMMETRIC)), rtol=1e-8)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_program_for_the_cpu_passes_a_stack_to_lapack(name):
    """Several such calls at once wait for each other's threads, with jaxlib before 0.11.2."""
    text = jax.jit(FUNCTIONS[name][0]).lower(SYMMETRIC).compile().as_text() or ""
    calls = re.findall(r"= \(?\w+\[([\d,]*)\].* custom-call\(.*lapack", text)
    assert calls
    for shape in calls:
        assert len(shape.split(",")) == 2, calls
