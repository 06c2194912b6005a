"""Hutchinson estimates, probes and power iteration on a matrix of three rows."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from small_problems import assert_trees_close, flat

import curvax as cx

MATRIX = np.array([[2.0, 1.0, 0.0], [1.0, -3.0, 0.5], [0.0, 0.5, 1.0]])


def as_tree(v: Any) -> Any:
    return {"a": v[:1], "b": v[1:]}


def product(v: Any) -> Any:
    return as_tree(MATRIX @ jnp.concatenate([v["a"], v["b"]]))


def all_signs() -> Any:
    """Every vector of signs: the mean over them is the expectation itself."""
    signs = jnp.array(list(itertools.product([-1.0, 1.0], repeat=3)))
    return {"a": signs[:, :1], "b": signs[:, 1:]}


def test_estimates_over_all_signs_are_exact():
    diagonal = cx.estimate_diagonal(product, all_signs())
    assert_trees_close(diagonal.mean, as_tree(jnp.diag(jnp.array(MATRIX))), tol=1e-15)
    trace = cx.estimate_trace(product, all_signs())
    np.testing.assert_allclose(trace.mean, np.trace(MATRIX), rtol=1e-15)


def test_standard_errors_are_those_of_the_mean():
    z = np.concatenate(list(all_signs().values()), axis=1)
    samples = z * (z @ MATRIX)
    error = lambda x: np.std(x, axis=0, ddof=1) / np.sqrt(len(x))
    diagonal = cx.estimate_diagonal(product, all_signs())
    assert_trees_close(diagonal.standard_error, as_tree(jnp.array(error(samples))))
    trace = cx.estimate_trace(product, all_signs())
    np.testing.assert_allclose(trace.standard_error, error(samples.sum(axis=1)), rtol=1e-12)


def test_one_probe_has_no_standard_error():
    one = jax.tree.map(lambda z: z[:1], all_signs())
    assert np.isnan(cx.estimate_trace(product, one).standard_error)
    assert np.isnan(flat(cx.estimate_diagonal(product, one).standard_error)).all()


@pytest.mark.parametrize("probe", [cx.rademacher, cx.gaussian_probe])
def test_probes_have_identity_covariance(probe):
    like = {"a": jnp.zeros((2,)), "b": jnp.zeros((1, 2))}
    draws = jax.vmap(lambda key: ravel_pytree(probe(key, like))[0])(
        jax.random.split(jax.random.key(0), 4000)
    )
    # Entries of the sample covariance have a standard error of at most √(2/4000).
    np.testing.assert_allclose(draws.T @ draws / 4000, np.eye(4), atol=4 * np.sqrt(2 / 4000))
    assert (set(np.unique(draws)) == {-1.0, 1.0}) == (probe is cx.rademacher)


def test_power_iteration_finds_the_largest_magnitude():
    values, vectors = np.linalg.eigh(MATRIX)
    top = np.argmax(np.abs(values))
    assert values[top] < 0
    pair = cx.power_iteration(product, as_tree(jnp.ones(3)), max_steps=200, tol=1e-9)
    assert pair.converged
    np.testing.assert_allclose(pair.value, values[top], rtol=1e-9)
    np.testing.assert_allclose(abs(flat(pair.vector) @ vectors[:, top]), 1.0, rtol=1e-9)
    distance = np.linalg.norm(MATRIX @ flat(pair.vector) - pair.value * flat(pair.vector))
    np.testing.assert_allclose(pair.residual, distance, atol=1e-12)
    assert pair.residual <= 1e-9 * abs(pair.value)


def test_power_iteration_with_too_few_steps_is_not_converged():
    pair = cx.power_iteration(product, as_tree(jnp.ones(3)), max_steps=3, tol=1e-9)
    assert pair.steps == 3
    assert not pair.converged
    v = np.ones(3) / np.sqrt(3)
    for _ in range(2):
        v = MATRIX @ v / np.linalg.norm(MATRIX @ v)
    np.testing.assert_allclose(flat(pair.vector), v, rtol=1e-12)
    np.testing.assert_allclose(pair.residual, np.linalg.norm(MATRIX @ v - (v @ MATRIX @ v) * v))
