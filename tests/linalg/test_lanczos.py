"""Lanczos, its quadrature and the restarted search, against dense matrices and recorded runs."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from small_problems import flat, large_spectrum, quick_jit
from trajectories import FOLDER, recorded

from curvax.linalg import (
    eigenpairs,
    estimate_trace,
    gaussian_probe,
    lanczos,
    materialize,
    power_iteration,
    rademacher,
    spectral_density,
)


def planted(values, seed=0):
    """(product on a tree of two leaves, a tree like it, dense eigenvectors) with that spectrum."""
    size = len(values)
    vectors = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]
    matrix = jnp.asarray(vectors * values @ vectors.T)
    like = {"a": jnp.zeros(3), "b": jnp.zeros((size - 3,))}
    unravel = ravel_pytree(like)[1]
    return (lambda v: unravel(matrix @ ravel_pytree(v)[0])), like, vectors


VALUES = np.concatenate([np.linspace(-1, 2, 37), [5.0, 7.5, -6.0]])


def test_lanczos_gives_an_orthonormal_basis_and_a_tridiagonal_matrix():
    product, like, _ = planted(VALUES)
    v0 = gaussian_probe(jax.random.key(0), like)
    found = quick_jit(lambda v: lanczos(product, v, 12))(v0)
    q = np.stack([flat(jax.tree.map(lambda b, i=i: b[i], found.basis)) for i in range(12)], 1)
    dense = np.asarray(materialize(product, like))
    np.testing.assert_allclose(q.T @ q, np.eye(12), atol=1e-14)
    np.testing.assert_allclose(q.T @ dense @ q, found.matrix, atol=1e-13)
    np.testing.assert_allclose(q[:, 0], flat(v0) / np.linalg.norm(flat(v0)), rtol=1e-14)
    rest = dense @ q - q @ np.asarray(found.matrix)
    np.testing.assert_allclose(np.linalg.norm(rest), found.residual, rtol=1e-10)
    bare = quick_jit(lambda v: lanczos(product, v, 12, keep_basis=False))(v0)
    np.testing.assert_allclose(bare.matrix, found.matrix, atol=1e-9)
    assert bare.basis is None


def test_lanczos_of_full_length_has_all_eigenvalues_once():
    """As many steps as rows repeat no eigenvalue, though the extreme ones converged before."""
    product, like, _ = planted(VALUES)
    found = lanczos(product, gaussian_probe(jax.random.key(1), like), len(VALUES))
    np.testing.assert_allclose(np.linalg.eigvalsh(found.matrix), np.sort(VALUES), atol=1e-10)


def test_lanczos_without_its_basis_repeats_eigenvalues():
    product, like, _ = planted(VALUES)
    v0 = gaussian_probe(jax.random.key(1), like)
    bare = np.linalg.eigvalsh(lanczos(product, v0, 60, keep_basis=False).matrix)
    assert (np.abs(bare - 7.5) < 1e-6).sum() > 1


def test_lanczos_stops_at_an_invariant_subspace():
    """From a sum of two eigenvectors two steps are exact; later nodes have no weight."""
    product, like, vectors = planted(VALUES)
    unravel = ravel_pytree(like)[1]
    v0 = unravel(jnp.asarray(vectors[:, -1] + vectors[:, -2]))
    found = lanczos(product, v0, 6)
    assert float(found.off_diagonal[1]) == 0
    np.testing.assert_allclose(np.linalg.eigvalsh(found.matrix[:2, :2]), [-6.0, 7.5], atol=1e-12)
    probes = jax.tree.map(lambda x: x[None], v0)
    density = spectral_density(product, probes, 6)
    mean, _ = density.moment(lambda x: x)
    assert float(mean) == pytest.approx(0.75)


@pytest.mark.parametrize("path", recorded("lanczos_*"))
def test_lanczos_follows_the_recorded_runs(path):
    run = np.load(path)
    arrays = np.load(FOLDER / f"curvature_{path.stem.removeprefix('lanczos_')}.npz")
    for name in ("hessian", "ggn"):
        if name in arrays:
            matrix = arrays[name]
        else:
            size = len(run["matfree/v0"])
            matrix = np.zeros((size, size))
            matrix[np.triu_indices(size)] = arrays[f"triu/{name}"]
            matrix = matrix + np.triu(matrix, 1).T
        product = lambda v, matrix=matrix: jnp.asarray(matrix) @ v
        v0 = jnp.asarray(run["matfree/v0"])
        for kind in ("full", "none"):
            expected = run[f"matfree/{name}_{kind}/T"]
            found = lanczos(product, v0, len(expected), keep_basis=kind == "full")
            scale = np.abs(expected).max()
            np.testing.assert_allclose(found.matrix, expected, rtol=0, atol=1e-8 * scale)
        q = run[f"matfree/{name}_full/Q"]
        found = lanczos(product, v0, q.shape[1])
        np.testing.assert_allclose(found.basis.T, q, atol=1e-6)


def to_the(power, x):
    return x**power


def test_quadrature_is_exact_for_polynomials_of_degree_2k_minus_1():
    product, like, _ = planted(VALUES)
    dense = np.asarray(materialize(product, like))
    z = rademacher(jax.random.key(2), like)
    density = spectral_density(product, jax.tree.map(lambda x: x[None], z), 4)
    np.testing.assert_allclose(density.weights.sum(axis=1), 1, rtol=1e-12)
    for power in range(8):
        expected = flat(z) @ np.linalg.matrix_power(dense, power) @ flat(z) / len(VALUES)
        found, _ = density.moment(functools.partial(to_the, power))
        assert float(found) == pytest.approx(expected, rel=1e-9)


def test_density_lies_within_its_standard_error():
    product, like, _ = planted(VALUES)
    keys = jax.random.split(jax.random.key(3), 64)
    probes = jax.vmap(rademacher, (0, None))(keys, like)
    grid, width = jnp.linspace(-7, 9, 60), 0.5
    density = quick_jit(lambda p: spectral_density(product, p, 20))(probes)
    mean, error = density.smoothed(grid, width)
    bells = np.exp(-0.5 * ((grid[:, None] - VALUES[None]) / width) ** 2)
    exact = bells.mean(axis=1) / (width * np.sqrt(2 * np.pi))
    z = (np.asarray(mean) - exact) / (np.asarray(error) + 1e-4)
    assert np.abs(z).max() < 4.5
    assert float(jnp.trapezoid(mean, grid)) == pytest.approx(1, abs=0.02)


ENDS = {
    "magnitude": [7.5, -6.0, 5.0],
    "largest": [7.5, 5.0, 2.0],
    "smallest": [-6.0, -1.0, -1 + 3 / 36],
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("subspace", [None, 8])
def test_eigenpairs_of_both_ends_are_the_planted_ones(end, subspace):
    product, like, _ = planted(VALUES)
    v0 = gaussian_probe(jax.random.key(4), like)
    search = lambda v: eigenpairs(product, v, 3, end=end, tol=1e-9, subspace=subspace)
    found = quick_jit(search)(v0)
    np.testing.assert_allclose(found.values, ENDS[end], atol=1e-9)
    assert found.converged.all()
    dense = np.asarray(materialize(product, like))
    vectors = np.stack([flat(jax.tree.map(lambda b, i=i: b[i], found.vectors)) for i in range(3)])
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(3), atol=1e-12)
    true = np.linalg.norm(dense @ vectors.T - vectors.T * np.asarray(found.values), axis=0)
    np.testing.assert_allclose(found.residuals, true, atol=1e-13)


def test_eigenvalues_come_with_their_multiplicity():
    values = np.array([4.0, 4.0, 4.0, 1.0, 0.5, -0.7, -0.7, -2.0])
    product, like, _ = planted(values)
    v0 = gaussian_probe(jax.random.key(5), like)
    found = eigenpairs(product, v0, 8)
    np.testing.assert_allclose(np.sort(found.values), np.sort(values), atol=1e-9)
    assert found.converged.all()
    alone = eigenpairs(lambda v: 3.0 * v, jnp.ones(1))
    assert (float(alone.values[0]), abs(float(alone.vectors[0, 0]))) == (3.0, 1.0)


def many_leaves(count=8):
    """A product on a tree of so many leaves, not diagonal, and a start vector."""
    scales = {f"w{n}": jnp.arange(1.0, 5.0) + n for n in range(count)}

    def product(v):
        total = sum(jnp.sum(x) for x in v.values())
        return {name: scales[name] * x + 0.1 * total for name, x in v.items()}

    return product, gaussian_probe(jax.random.key(10), scales)


def test_a_small_vector_of_many_leaves_is_searched_as_one_array(monkeypatch):
    """The same pairs leaf by leaf, from a longer program."""
    product, v0 = many_leaves()
    search = lambda v: eigenpairs(product, v, 3, end="largest", tol=1e-10, subspace=10)
    joined = jax.jit(search).lower(v0)
    monkeypatch.setattr(sys.modules["curvax.linalg.eigenpairs"], "JOINED", 0)
    apart = jax.jit(lambda v: search(v)).lower(v0)
    lines = lambda lowered: len(lowered.as_text().splitlines())
    assert lines(apart) > 1.3 * lines(joined)
    found, expected = joined.compile()(v0), apart.compile()(v0)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, expected)
    assert int(found.products) == int(expected.products)
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-12)
    overlap = [np.asarray(found.vectors[n]) @ np.asarray(expected.vectors[n]).T for n in v0]
    np.testing.assert_allclose(np.abs(sum(overlap)), np.eye(3), atol=1e-9)  # signs are free
    assert found.converged.all()


def test_eigenvectors_have_the_dtypes_of_their_leaves():
    scales = {"a": jnp.arange(1.0, 5.0), "b": jnp.arange(5.0, 8.0, dtype=jnp.float32)}
    product = lambda v: jax.tree.map(jnp.multiply, scales, v)
    found = eigenpairs(product, jax.tree.map(jnp.ones_like, scales), 7)
    assert {k: x.dtype for k, x in found.vectors.items()} == {"a": jnp.float64, "b": jnp.float32}
    np.testing.assert_allclose(np.sort(found.values), np.arange(1, 8), rtol=1e-6)


def test_ten_eigenpairs_of_ten_thousand_dimensions_are_the_planted_ones():
    """A planted spectrum, diagonal but for a reflection, with true residuals."""
    values, reflect = large_spectrum()
    product = lambda v: reflect(values * reflect(v))
    v0 = jax.random.normal(jax.random.key(7), values.shape)
    found = jax.jit(lambda v: eigenpairs(product, v, 10, tol=1e-7))(v0)
    np.testing.assert_allclose(found.values, np.arange(11.0, 1.0, -1), rtol=1e-6)
    true = np.linalg.norm(
        jax.vmap(product)(found.vectors) - found.values[:, None] * found.vectors, axis=1
    )
    np.testing.assert_allclose(found.residuals, true, rtol=1e-3, atol=1e-12)
    assert found.converged.all()
    ritz = jnp.linalg.eigvalsh(jax.jit(lambda v: lanczos(product, v, 200))(v0).matrix)
    assert ((ritz > 1.5).sum(), (jnp.diff(ritz[ritz > 1.5]) > 0.5).all()) == (10, True)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_lanczos_and_eigenpairs_run_on_explicitly_sharded_vectors():
    values = jnp.asarray(np.random.default_rng(0).permutation(32), float) - 7
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        diagonal = {"w": jax.device_put(values.reshape(16, 2), P("rows"))}
        v0 = jax.tree.map(lambda d: jnp.ones_like(d) + 0.01 * d, diagonal)
        probes = jax.tree.map(lambda v: jnp.stack([v, 1 / v]), v0)

        def found(diagonal, v0, probes):
            product = lambda v: jax.tree.map(jnp.multiply, diagonal, v)
            pairs = eigenpairs(product, v0, 2, end="largest", subspace=12)
            density = spectral_density(product, probes, 6)
            bare = spectral_density(product, probes, 6, keep_basis=False)
            trace, power = estimate_trace(product, probes), power_iteration(product, v0)
            return pairs, density, bare, trace, power.vector

        run = jax.jit(found)
        parts, density, *rest = run(diagonal, v0, probes)
        assert jax.typeof(parts.vectors["w"]).sharding.spec == P(None, "rows", None)
    np.testing.assert_allclose(parts.values, [24, 23], rtol=1e-10)
    whole = jax.tree.map(np.asarray, (diagonal, v0, probes))
    _, *expected = jax.jit(found)(*whole)
    for x, y in zip(jax.tree.leaves([density, *rest]), jax.tree.leaves(expected)):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9)


def test_eigenpairs_with_too_few_products_are_not_converged():
    product, like, _ = planted(np.linspace(0, 1, 40))
    v0 = gaussian_probe(jax.random.key(8), like)
    found = eigenpairs(product, v0, 3, tol=1e-12, max_products=10, subspace=8)
    assert not found.converged.all()
    assert int(found.products) <= 8 + 3 + 10
    assert (found.residuals > 1e-12).any()


def test_eigenpair_and_lanczos_errors_give_the_valid_options():
    product, like, _ = planted(VALUES)
    with pytest.raises(ValueError, match="'largest'"):
        eigenpairs(product, like, end="top")
    with pytest.raises(ValueError, match="up to the 40 rows"):
        eigenpairs(product, like, 41)
    with pytest.raises(ValueError, match="subspace"):
        eigenpairs(product, like, 5, subspace=5)
    with pytest.raises(ValueError, match="positive integer"):
        lanczos(product, like, 0)


def test_eigenvalues_near_zero_converge_next_to_large_ones():
    """A singular matrix: the sought eigenvalues are rounding, and small next to the largest."""
    product, like, _ = planted(np.concatenate([np.zeros(5), np.linspace(1, 3, 15)]))
    found = eigenpairs(product, gaussian_probe(jax.random.key(9), like), 2, end="smallest")
    np.testing.assert_allclose(found.values, 0, atol=1e-12)
    assert found.converged.all()
