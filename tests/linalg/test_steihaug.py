"""Steihaug's solver against the textbook's path and the true minimiser in the ball."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_systems import (
    SIZE,
    assert_solves,
    definite,
    indefinite,
    jitted,
    numbers,
    product_of,
    relative_residual,
    textbook_iterates,
    tree_of,
    vector_of,
)

from curvax.linalg import StopReason, cg, steihaug

B = numbers(9, SIZE)


def model(matrix, x):
    return 0.5 * x @ matrix @ x - B @ x


def minimum_in_ball(matrix, radius):
    """The least model value over the ball, by bisection on the multiplier: (A + μI) x = b."""
    values, vectors = np.linalg.eigh(matrix)
    along = vectors.T @ B
    x_at = lambda mu: vectors @ (along / (values + mu))
    if values[0] > 0 and np.linalg.norm(x_at(0.0)) <= radius:
        return model(matrix, x_at(0.0))
    low, high = max(0.0, -values[0]) + 1e-12, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.linalg.norm(x_at(middle)) > radius else (low, middle)
    return model(matrix, x_at(high))


def edge_of_path(iterates, radius):
    """Where the polygon through the iterates leaves the ball: (its segment, the point)."""
    for i, (a, b) in enumerate(itertools.pairwise(iterates)):
        if np.linalg.norm(b.x) >= radius:
            d = b.x - a.x
            roots = np.roots([d @ d, 2 * a.x @ d, a.x @ a.x - radius**2])
            return i, a.x + roots.max() * d
    raise AssertionError("the path stays inside")


@pytest.mark.parametrize("share", [0.05, 0.4, 0.9])
def test_steihaug_follows_the_path_of_cg_to_the_boundary(share):
    matrix = definite()
    iterates = textbook_iterates(SIZE, matrix, B)
    radius = share * np.linalg.norm(iterates[-1].x)
    i, edge = edge_of_path(iterates, radius)
    found = jitted(steihaug(radius, SIZE, tol=0.0), matrix, B)
    assert_solves(found.x, edge, 1e-11)
    assert found.reason == StopReason.boundary
    assert found.steps == i + 1
    np.testing.assert_allclose(np.linalg.norm(vector_of(found.x)), radius, rtol=1e-12)
    np.testing.assert_allclose(found.residual, relative_residual(matrix, found.x, B), rtol=1e-9)


@pytest.mark.parametrize("radius", [0.1, 1.0, 3.0, 10.0])
def test_steihaug_reduces_the_model_by_at_least_half_of_the_optimum(radius):
    # For positive definite A: Yuan, On the truncated conjugate gradient method, 2000.
    matrix = definite()
    found = jitted(steihaug(radius, SIZE, tol=1e-12), matrix, B)
    least = minimum_in_ball(matrix, radius)
    value = model(matrix, np.asarray(vector_of(found.x)))
    assert least * (1 + 1e-9) <= value <= least / 2


def test_steihaug_inside_a_large_region_is_cg():
    free = jitted(cg(6, tol=0.0), definite(), B)
    found = jitted(steihaug(1e3, 6, tol=0.0), definite(), B)
    np.testing.assert_array_equal(vector_of(found.x), vector_of(free.x))
    assert found.reason == StopReason.max_steps


@pytest.mark.parametrize("radius", [0.3, 5.0])
def test_negative_curvature_at_the_first_step_goes_to_the_boundary(radius):
    found = jitted(steihaug(radius), -definite(), B)
    assert_solves(found.x, radius * B / np.linalg.norm(B), 1e-12)
    assert found.reason == StopReason.negative_curvature
    assert found.steps == 1


def test_negative_curvature_at_a_later_step_goes_on_to_the_boundary():
    matrix = indefinite()
    before = jitted(cg(SIZE, tol=0.0), matrix, B)
    radius = 2 * float(jnp.linalg.norm(vector_of(before.x)))
    found = jitted(steihaug(radius, SIZE), matrix, B)
    x = np.asarray(vector_of(found.x))
    assert found.reason == before.reason == StopReason.negative_curvature
    assert found.steps == before.steps > 1
    np.testing.assert_allclose(np.linalg.norm(x), radius, rtol=1e-12)
    assert model(matrix, x) < model(matrix, np.asarray(vector_of(before.x)))
    assert minimum_in_ball(matrix, radius) * (1 + 1e-9) <= model(matrix, x)


def test_steihaug_radius_is_euclidean_with_a_preconditioner():
    matrix, m = definite(), definite(7)
    solver = steihaug(0.4, SIZE, preconditioner=product_of(np.linalg.inv(m)))
    found = jitted(solver, matrix, B)
    _, edge = edge_of_path(textbook_iterates(SIZE, matrix, B, m=m), 0.4)
    assert_solves(found.x, edge, 1e-10)


def test_a_traced_radius_compiles_once():
    traces = []

    @jax.jit
    def solve(radius):
        traces.append(radius)
        return steihaug(radius)(product_of(definite()), tree_of(jnp.asarray(B))).x

    lengths = [float(jnp.linalg.norm(vector_of(solve(r)))) for r in (0.0, 0.1, 0.7)]
    np.testing.assert_allclose(lengths, [0.0, 0.1, 0.7], rtol=1e-12)
    assert len(traces) == 1
