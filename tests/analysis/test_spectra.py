"""Spectra of losses against recorded and dense matrices, for several precisions and models."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import net_objective
from framework_problems import equinox_problem, nnx_problem
from jax.flatten_util import ravel_pytree
from recorded_curvature import read
from small_problems import (
    dense_hessian,
    flat,
    large_spectrum,
    net,
    net_batch,
    net_loss,
    net_params,
    quick_jit,
)
from trajectories import recorded

import curvax as cx
from curvax.analysis import curvature_trace, hessian_spectrum, top_eigenpairs
from curvax.curvature import hvp

every_recording = pytest.mark.parametrize("path", recorded("curvature_*"))
NAMES = {
    "hessian": "hessian",
    "gauss_newton": "ggn",
    "fisher": "fisher",
    "empirical_fisher": "empirical_fisher",
}
RELATIVE = 1e-8


def tree_of(run: Any, vectors: np.ndarray) -> Any:
    """Recorded vectors [n, P] as a tree with a new first axis."""
    return jax.vmap(run.problem.unflatten)(jnp.asarray(vectors, float))


def assert_near(found: Any, expected: Any, scale: float) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=RELATIVE * scale)


def net_hessian() -> np.ndarray:
    return dense_hessian(lambda p: net_loss(p, net_batch()), net_params())


# Recorded spectra.


@every_recording
@pytest.mark.parametrize("curvature", NAMES)
def test_largest_eigenvalues_are_the_recorded_ones(path, curvature):
    run = read(path)
    options: Any = dict(curvature=curvature, end="largest")
    search = lambda p: top_eigenpairs(run.objective(), p, 3, **options)
    found = quick_jit(search)(run.params)
    expected = run.arrays[f"eigvals/{NAMES[curvature]}"][::-1][:3]
    assert_near(found.values, expected, expected[0])
    assert found.converged.all()


@every_recording
def test_pyhessian_finds_the_same_eigenpairs_up_to_its_bias(path):
    """It divides by ‖v‖ + 1e-6 twice an iteration: its values are 2e-6 too small."""
    run = read(path)
    v0 = run.problem.unflatten(jnp.asarray(run.arrays["pyhessian/top5_tight_v0"][0]))
    found = quick_jit(lambda p: top_eigenpairs(run.objective(), p, 5, v0=v0))(run.params)
    dense = run.arrays["top5_by_magnitude_dense"]
    assert_near(found.values, dense, abs(dense[0]))
    bias = run.arrays["pyhessian/top5_tight"] / np.asarray(found.values) - 1
    np.testing.assert_allclose(bias, -2e-6, atol=2e-8)
    vectors = np.stack([run.problem.flatten(v) for v in _rows(found.vectors, 5)])
    along = np.abs(np.sum(vectors * run.arrays["pyhessian/top5_tight_vecs"], axis=1))
    np.testing.assert_allclose(along, 1, atol=1e-5)


def _rows(tree: Any, count: int) -> list[Any]:
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(count)]


@every_recording
def test_trace_with_pyhessian_probes_is_pyhessians(path):
    run = read(path)
    probes = tree_of(run, run.arrays["pyhessian/trace_z_200"])
    found = curvature_trace(run.objective(), run.params, probes=probes)
    samples = run.arrays["pyhessian/trace_vHv_200"]
    assert float(found.mean) == pytest.approx(samples.mean(), rel=1e-10)
    error = samples.std(ddof=1) / np.sqrt(len(samples))
    assert float(found.standard_error) == pytest.approx(error, rel=1e-10)
    assert abs(float(found.mean) - run.arrays["trace/hessian"]) < 3 * error


@every_recording
def test_density_with_pyhessian_probes_is_pyhessians(path):
    run = read(path)
    probes = tree_of(run, run.arrays["pyhessian/density_z"])
    spectrum = lambda p: hessian_spectrum(run.objective(), p, probes=probes, steps=20)
    density = quick_jit(spectrum)(run.params).density
    z, hessian = run.arrays["pyhessian/density_z"].astype(float), run.expected("hessian")
    for power in range(1, 8):
        each = np.einsum("ip,pq,iq->i", z, np.linalg.matrix_power(hessian, power), z)
        found, _ = density.moment(lambda x, n=power: x**n)
        assert float(found) == pytest.approx(each.mean() / z.shape[1], rel=RELATIVE)
    nodes, weights = (run.arrays[f"pyhessian/density_{name}"] for name in ("nodes", "weights"))
    order = np.argsort(nodes, axis=1)
    nodes, weights = (np.take_along_axis(x, order, axis=1) for x in (nodes, weights))
    # It divides by ‖v‖ + 1e-6 here too.
    np.testing.assert_allclose(density.nodes, nodes, rtol=0, atol=1e-5)
    np.testing.assert_allclose(density.weights, weights, rtol=0, atol=1e-5)
    # Its variance is 1e-3 of the range, which it widens by 0.01 at either end.
    spread = nodes.max(axis=1).mean() - nodes.min(axis=1).mean() + 0.02
    grid = run.arrays["pyhessian/esd_grid"]
    mean, _ = density.smoothed(jnp.asarray(grid), np.sqrt(1e-3 * max(1.0, spread)))
    mean = np.asarray(mean) / (np.sum(mean) * (grid[1] - grid[0]))
    np.testing.assert_allclose(mean, run.arrays["pyhessian/esd_density"], atol=1e-4)


# Dense matrices.


@pytest.mark.parametrize("end", ["magnitude", "largest", "smallest"])
@pytest.mark.parametrize("method", ["lanczos", "power"])
def test_both_methods_find_both_ends_of_the_spectrum(method, end):
    values, vectors = np.linalg.eigh(net_hessian())
    rank = {"magnitude": -np.abs(values), "largest": -values, "smallest": values}[end]
    wanted = np.argsort(rank)[:2]
    options: dict[str, Any] = dict(end=end, method=method, tol=1e-5, max_products=6000)
    search = lambda p: top_eigenpairs(cx.Objective(net_loss, net_batch()), p, 2, **options)
    found = quick_jit(search)(net_params())
    np.testing.assert_allclose(found.values, values[wanted], atol=1e-8)
    assert found.converged.all()
    rows = np.stack([flat(v) for v in _rows(found.vectors, 2)])
    np.testing.assert_allclose(np.abs(rows @ vectors[:, wanted]), np.eye(2), atol=1e-3)
    true = np.linalg.norm(net_hessian() @ rows.T - rows.T * np.asarray(found.values), axis=0)
    np.testing.assert_allclose(found.residuals, true, rtol=1e-6, atol=1e-13)


def test_power_iteration_with_too_few_products_is_not_converged():
    objective = cx.Objective(net_loss, net_batch())
    found = top_eigenpairs(objective, net_params(), 2, method="power", max_products=12)
    assert not found.converged.any()
    assert int(found.products) <= 12 + 2
    distance = np.abs(np.asarray(found.values)[:, None] - np.linalg.eigvalsh(net_hessian())[None])
    assert (distance.min(axis=1) <= np.asarray(found.residuals)).all()


def test_hessian_spectrum_has_the_ends_and_the_bulk_ratio():
    """As many steps as parameters: the Ritz values are the eigenvalues."""
    values = np.linalg.eigvalsh(net_hessian())
    found = hessian_spectrum(cx.Objective(net_loss, net_batch()), net_params(), probes=2)
    assert found.density.nodes.shape == (2, len(values))
    assert float(found.largest) == pytest.approx(values[-1], rel=1e-10)
    assert float(found.smallest) == pytest.approx(values[0], rel=1e-10)
    assert float(found.bulk_ratio) == pytest.approx(values[-1] / values[-5], rel=1e-10)


def test_fewer_lanczos_steps_bound_the_ends_from_inside():
    values = np.linalg.eigvalsh(net_hessian())
    found = hessian_spectrum(cx.Objective(net_loss, net_batch()), net_params(), steps=7)
    assert values[0] < float(found.smallest) < float(found.largest) < values[-1]
    bare = hessian_spectrum(
        cx.Objective(net_loss, net_batch()), net_params(), steps=7, keep_basis=False
    )
    assert float(bare.largest) == pytest.approx(float(found.largest), rel=1e-8)
    assert np.isnan(bare.bulk_ratio)


def test_spectrum_of_a_low_rank_matrix_has_its_own_smallest_value():
    """F̄ of four examples, seen by Lanczos from a start within its range: four values, no zeros."""
    objective = cx.Objective(net_loss, net_batch(4))
    each = [
        objective.on(jax.tree.map(lambda x, i=i: x[i : i + 1], objective.batch)) for i in range(4)
    ]
    rows = np.stack([flat(one.value_and_grad(net_params())[1]) for one in each])
    values = np.linalg.eigvalsh(rows @ rows.T / 4)
    start = ravel_pytree(net_params())[1](jnp.asarray(rows.sum(axis=0)))
    probes = jax.tree.map(lambda x: x[None], start)
    found = hessian_spectrum(objective, net_params(), curvature="empirical_fisher", probes=probes)
    assert float(found.smallest) == pytest.approx(values[0], rel=1e-8)
    assert float(found.largest) == pytest.approx(values[-1], rel=1e-10)
    assert np.isnan(found.bulk_ratio)


def test_trace_of_a_diagonal_matrix_is_exact_with_one_probe():
    weights = jnp.arange(1.0, 5.0)
    found = curvature_trace(
        lambda p: 0.5 * jnp.sum(weights * p["x"] ** 2), {"x": weights}, probes=1
    )
    assert float(found.mean) == 10
    assert np.isnan(found.standard_error)


def test_curvature_may_be_a_callable():
    objective, params = cx.Objective(net_loss, net_batch()), net_params()
    own = partial(hvp, mode="reverse-over-reverse")
    found = curvature_trace(objective, params, curvature=own)
    expected = curvature_trace(objective, params)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    plain = curvature_trace(lambda p: net_loss(p, net_batch()), params)
    np.testing.assert_allclose(plain, expected, rtol=1e-12)


# Compilation, precision, models.


def test_curvature_trace_compiles_once_for_a_loss_and_inlines_under_jit():
    traces = []

    def loss(params: Any, batch: Any) -> jax.Array:
        traces.append(isinstance(batch["x"], jax.core.Tracer))
        return net_loss(params, batch)

    search = lambda params, batch: curvature_trace(cx.Objective(loss, batch), params)
    search(net_params(), net_batch())
    count = len(traces)
    other = jax.tree.map(lambda x: 2 * x, net_batch())
    value = search(net_params(), other)
    assert len(traces) == count
    assert all(traces)
    np.testing.assert_allclose(quick_jit(search)(net_params(), other), value, rtol=1e-12)


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_microbatches_give_the_same_density(curvature):
    spectrum = lambda **options: hessian_spectrum(
        net_objective("categorical", **options), net_params(), curvature=curvature, steps=5
    )
    found, expected = spectrum(microbatch=2), spectrum()
    np.testing.assert_allclose(found.density, expected.density, rtol=1e-10, atol=1e-12)


def test_bfloat16_model_has_float32_vectors_and_sums():
    params, batch = net_params(jnp.bfloat16), net_batch(dtype=jnp.bfloat16)
    widened = jax.tree.map(lambda x: x.astype(jnp.float64), (params, batch))
    values = np.linalg.eigvalsh(dense_hessian(lambda p: net_loss(p, widened[1]), widened[0]))
    found = top_eigenpairs(cx.Objective(net_loss, batch), params, end="largest")
    assert {x.dtype for x in jax.tree.leaves(found.vectors)} == {jnp.dtype("float32")}
    assert found.values.dtype == jnp.float32
    # Products round to eight bits.
    assert float(found.values[0]) == pytest.approx(values[-1], rel=2e-2)
    assert found.converged.all()
    trace = curvature_trace(cx.Objective(net_loss, batch), params, probes=64)
    assert float(trace.mean) == pytest.approx(values.sum(), abs=3 * float(trace.standard_error))


@pytest.mark.parametrize("problem", [nnx_problem, equinox_problem])
def test_eigenpairs_of_nnx_and_equinox_models_are_the_dense_ones(problem):
    objective, params = problem()
    values = np.linalg.eigvalsh(dense_hessian(objective, params))
    search = quick_jit(lambda p: top_eigenpairs(objective, p, 2, end="largest"))
    found = search(params)
    np.testing.assert_allclose(found.values, values[::-1][:2], rtol=1e-8)
    assert str(jax.tree.structure(found.vectors)) == str(jax.tree.structure(params))


# Errors.


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (partial(top_eigenpairs, curvature="hesian"), ValueError, "'gauss_newton'"),
        (partial(top_eigenpairs, method="arnoldi"), ValueError, "'lanczos', 'power'"),
        (partial(top_eigenpairs, end="top"), ValueError, "'largest'"),
        (partial(top_eigenpairs, end="top", method="power"), ValueError, "'largest'"),
        (partial(top_eigenpairs, k=22), ValueError, "up to the 21 rows"),
        (partial(top_eigenpairs, k=22, method="power"), ValueError, "the 21 parameters"),
        (partial(hessian_spectrum, steps=0), ValueError, "positive integer"),
        (partial(hessian_spectrum, probes=0), ValueError, "positive integer"),
        (partial(curvature_trace, probes=2.5), ValueError, "positive integer"),
        (partial(curvature_trace, curvature="fisher"), ValueError, "`bernoulli`"),
    ],
)
def test_options_out_of_range_raise_with_the_valid_range(call, error, match):
    objective = cx.Objective(
        lambda z, batch: jnp.mean((z - batch["y"]) ** 2), net_batch(), model=net
    )
    with pytest.raises(error, match=match):
        call(objective, net_params())


def test_integer_parameters_are_refused_by_name():
    params = net_params() | {"step": jnp.zeros((), jnp.int32)}
    with pytest.raises(TypeError, match="`step` has dtype int32"):
        top_eigenpairs(cx.Objective(net_loss, net_batch()), params)


def test_spectrum_of_ten_thousand_parameters_is_the_planted_one():
    """A planted spectrum off the axes: its pairs, and its density within the error."""
    values, reflect = large_spectrum()
    loss = lambda x: 0.5 * jnp.sum(values * reflect(x) ** 2)
    pairs = top_eigenpairs(loss, jnp.zeros(10_000), 10, tol=1e-7)
    np.testing.assert_allclose(pairs.values, np.arange(11.0, 1.0, -1), rtol=1e-6)
    assert pairs.converged.all()
    spectrum = hessian_spectrum(loss, jnp.zeros(10_000), probes=24, steps=80)
    grid, width = jnp.linspace(-1.5, 12, 200), 0.2
    mean, error = spectrum.density.smoothed(grid, width)
    bells = np.exp(-0.5 * ((grid[:, None] - values[None]) / width) ** 2)
    exact = bells.mean(axis=1) / (width * np.sqrt(2 * np.pi))
    assert np.abs((np.asarray(mean) - exact) / (np.asarray(error) + 1e-9)).max() < 5
    assert np.asarray(error).max() < 0.01 * exact.max()
    assert float(spectrum.largest) == pytest.approx(11, rel=1e-9)
    assert float(spectrum.bulk_ratio) == pytest.approx(11 / 7, rel=1e-6)
