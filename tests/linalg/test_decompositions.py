"""Decompositions of stacks: those of their matrices, one by one in programs for the CPU."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from curvax.devices import meshes
from curvax.linalg import decompositions

STACK = jax.random.normal(jax.random.key(0), (2, 3, 5, 5))
SYMMETRIC = STACK @ jnp.swapaxes(STACK, -1, -2) + jnp.eye(5)[None, None]
FUNCTIONS: dict[str, tuple[Any, Any]] = {
    "eigenvalues": (lambda m: decompositions.eigh(m)[0][0], np.linalg.eigvalsh),
    "projections": (
        lambda m: jnp.square(decompositions.eigh(m)[0][1]),
        lambda m: np.square(np.linalg.eigh(m)[1]),
    ),
    "orthogonal factor": (
        lambda m: jnp.square(decompositions.orthogonal_factors(m)[0]),
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


@pytest.mark.parametrize("name", ["eigenvalues", "projections", "orthogonal factor"])
def test_a_map_over_matrices_does_not_make_a_stack_of_them(name):
    """As over the groups of `per_group`, twice."""
    f, expected = FUNCTIONS[name]
    mapped = jax.jit(jax.vmap(jax.vmap(f)))
    np.testing.assert_allclose(mapped(SYMMETRIC), expected(np.asarray(SYMMETRIC)), rtol=1e-8)
    text = mapped.lower(SYMMETRIC).compile().as_text() or ""
    calls = re.findall(r"= \(?\w+\[([\d,]*)\].* custom-call\(.*lapack", text)
    assert calls
    assert {len(shape.split(",")) for shape in calls} == {2}


# Divided among devices


def stacks_of(matrix):
    return [matrix, matrix[0, 0], 2 * matrix[0], matrix[:, 0]]


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("name", ["eigenvalues", "projections", "inverse"])
def test_devices_that_divide_matrices_have_the_same_results(name, check):
    f = FUNCTIONS.get(name, (lambda m: decompositions.inverses(m)[0], None))[0]
    expected = [f(x) for x in stacks_of(SYMMETRIC)]

    def on_device(matrix):
        with decompositions.divided(("d",)):
            return [f(x) for x in stacks_of(matrix)]

    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(on_device, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=check)
    for found, x in zip(jax.jit(mapped)(SYMMETRIC), expected):
        np.testing.assert_allclose(found, x, rtol=1e-10, atol=1e-12)


def test_each_device_decomposes_its_share_only():
    """Sixteen matrices on eight devices, two on each."""

    def on_device(matrix):
        with decompositions.divided(("d",)):
            number = lambda m: (1.0 + jax.lax.axis_index("d") + 0 * m[0, 0],)
            ((owners,),) = decompositions._each(number, [(jnp.broadcast_to(matrix, (16, 5, 5)),)])
            return owners

    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(on_device, mesh=mesh, in_specs=P(), out_specs=P())
    owners = np.asarray(jax.jit(mapped)(SYMMETRIC[0, 0]))
    assert sorted(owners) == sorted([*range(1, 9)] * 2)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_devices_of_the_mesh_in_the_context_divide_matrices_under_jit(kind):
    """Without an axis bound by a map: one sum for all, and none without a mesh."""
    inverse = lambda m: decompositions.inverses(*stacks_of(m))

    def divided(matrix):
        with decompositions.divided(meshes.in_context(("d",))):
            return inverse(matrix)

    assert "all_reduce" not in jax.jit(divided).lower(SYMMETRIC).as_text()
    mesh = jax.make_mesh((4, 2), ("d", "e"), axis_types=(jax.sharding.AxisType[kind],) * 2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(SYMMETRIC, jax.NamedSharding(mesh, P()))
        assert "all_reduce" in jax.jit(divided).lower(placed).as_text()
        found = jax.tree.map(np.asarray, jax.jit(divided)(placed))
    for x, expected in zip(found, inverse(SYMMETRIC), strict=True):
        np.testing.assert_allclose(x, expected, rtol=1e-10, atol=1e-12)


def test_shares_are_even_where_sizes_differ():
    loads = decompositions._Division(())
    loads.loads = np.zeros(4)
    for size, count in ((8, 3), (16, 1), (4, 12), (8, 4), (2, 30)):
        loads.owners(count, float(size**3))
    assert loads.loads.max() <= 16**3  # the largest matrix alone
    assert loads.loads.min() > 0
