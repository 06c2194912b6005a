"""Sharpness measures: on quadratics by formulas, on a net by naive loops, on devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from small_problems import flat, net_batch, net_loss, net_params

import curvax as cx
from curvax.analysis import m_sharpness, random_sharpness, sharpness, surrogate_gap
from curvax.analysis.compiling import compiled_once

MATRIX = np.diag([4.0, 1.0, 0.5]) + 0.3
POINT = {"w": jnp.array([1.0, -2.0, 0.5])}
GRADIENT = MATRIX @ np.asarray(POINT["w"])


def quadratic(params):
    return 0.5 * params["w"] @ MATRIX @ params["w"]


def linear(params):
    return jnp.dot(GRADIENT, params["w"])


def objective():
    return cx.Objective(net_loss, net_batch())


# Worst case.


@pytest.mark.parametrize(
    ("p", "dual"), [(2, 2), (1, np.inf), (np.inf, 1), (3, 1.5)], ids=["2", "1", "inf", "3"]
)
def test_sharpness_of_a_linear_loss_is_the_dual_norm(p, dual):
    found = sharpness(linear, POINT, 0.1, p=p)
    assert float(found.value) == pytest.approx(0.1 * np.linalg.norm(GRADIENT, dual), rel=1e-12)
    assert float(found.loss) == pytest.approx(float(linear(POINT)))
    assert float(found.perturbed_loss - found.loss) == float(found.value)


def test_adaptive_sharpness_of_a_linear_loss_is_the_scaled_norm():
    scaled = (np.abs(POINT["w"]) + 0.01) * GRADIENT
    found = sharpness(linear, POINT, 0.5, ascent=cx.asam(0.01))
    assert float(found.value) == pytest.approx(0.5 * np.linalg.norm(scaled), rel=1e-12)


def naive_ascent(rho, steps):
    """The losses that projected gradient ascent on the quadratic visits."""
    losses, e = [], np.zeros(3)
    for number in range(steps):
        g = MATRIX @ (np.asarray(POINT["w"]) + e)
        e = e + (rho / steps if number else rho) * g / np.linalg.norm(g)
        e = e * min(1.0, rho / np.linalg.norm(e))
        losses.append(float(quadratic({"w": jnp.asarray(POINT["w"] + e)})))
    return np.array(losses)


@pytest.mark.parametrize("steps", [1, 4])
def test_sharpness_is_the_highest_loss_of_a_projected_ascent(steps):
    losses = naive_ascent(0.7, steps)
    found = sharpness(quadratic, POINT, 0.7, steps=steps)
    assert float(found.perturbed_loss) == pytest.approx(losses.max(), rel=1e-12)


def test_sharpness_of_many_steps_is_the_maximum_over_the_ball():
    """ε = (μI - A)⁻¹g with μ above all eigenvalues and ‖ε‖ = ρ."""
    values, vectors = np.linalg.eigh(MATRIX)
    g = vectors.T @ GRADIENT
    low, high = values[-1] + 1e-9, values[-1] + 100.0
    for _ in range(200):
        mu = (low + high) / 2
        low, high = (mu, high) if np.linalg.norm(g / (mu - values)) > 2.0 else (low, mu)
    worst = vectors @ (g / (mu - values))
    rise = float(quadratic({"w": POINT["w"] + worst})) - float(quadratic(POINT))
    first = float(sharpness(quadratic, POINT, 2.0).value)
    found = float(sharpness(quadratic, POINT, 2.0, steps=60, step_size=0.5).value)
    assert found == pytest.approx(rise, rel=1e-6)
    assert first < 0.999 * rise


def test_sharpness_keeps_the_maximum_of_the_ascent():
    """Past the summit the loss falls again; what counts is the summit."""
    summit = lambda params: -jnp.sum((params["w"] - 1.0) ** 2)
    start = {"w": jnp.zeros(1)}
    found = sharpness(summit, start, 1.0, steps=3, step_size=2.0, projected=False)
    assert float(found.perturbed_loss) == 0.0


def test_sharpness_takes_masks_and_radii_by_leaf():
    params = {"a": jnp.array([2.0]), "b": jnp.array([3.0])}
    loss = lambda params: jnp.sum(params["a"]) + 2 * jnp.sum(params["b"])
    assert float(sharpness(loss, params, 0.1, mask={"a": True, "b": False}).value) == (
        pytest.approx(0.1)
    )
    radii = {"a": 0.5, "b": 0.25}
    expected = (0.5 + 4 * 0.25) / 5**0.5
    assert float(sharpness(loss, params, radii).value) == pytest.approx(expected)


def test_sharpness_of_one_step_is_the_gap_of_sam():
    for options in ({}, {"p": jnp.inf}, {"ascent": cx.asam(0.1)}):
        tx = cx.sam_perturb(0.2, **options)
        params, state = net_params(), tx.init(net_params())
        loss = objective()
        _, grads = loss.value_and_grad(params)
        _, state = tx.update(grads, state, params, value_fn=loss)
        expected = float(cx.diagnostics(state)["perturbed_loss"])
        found = sharpness(objective(), params, 0.2, **options)
        assert float(found.perturbed_loss) == pytest.approx(expected, rel=1e-6)


def test_half_precision_parameters_are_perturbed_in_float32():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), net_params())
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    for measure in (sharpness, surrogate_gap, random_sharpness):
        found, expected = (measure(objective(), p, 1e-3) for p in (half, wide))
        np.testing.assert_array_equal(found[0], expected[0])
        assert float(found[0]) != 0


# By groups.


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_m_sharpness_is_the_mean_over_a_loop_of_groups(chunk):
    batch, params = net_batch(), net_params()
    groups = [jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], batch) for i in range(4)]
    expected = [sharpness(cx.Objective(net_loss, g), params, 0.2, steps=2).value for g in groups]
    found = m_sharpness(objective(), params, 0.2, 2, steps=2, chunk=chunk)
    np.testing.assert_allclose(found.groups, expected, rtol=1e-12)
    assert float(found.value) == pytest.approx(np.mean(expected), rel=1e-12)


def test_m_sharpness_of_one_group_is_the_sharpness():
    found = m_sharpness(objective(), net_params(), 0.2, 8, p=1)
    assert float(found.value) == float(sharpness(objective(), net_params(), 0.2, p=1).value)


def test_m_sharpness_counts_groups_by_weight():
    batch = dict(net_batch(), w=jnp.array([1.0, 1.0, 0.0, 0.0, 3.0, 1.0, 0.0, 2.0]))

    def loss(params, batch):
        each = jax.vmap(lambda x, y: net_loss(params, {"x": x[None], "y": y[None]}))
        losses = each(batch["x"], batch["y"])
        return jnp.sum(batch["w"] * losses) / jnp.sum(batch["w"])

    found = m_sharpness(cx.Objective(loss, batch, weight="w"), net_params(), 0.1, 2)
    assert np.isnan(found.groups[1])
    expected = np.average(np.nan_to_num(found.groups), weights=[2, 0, 4, 2])
    assert float(found.value) == pytest.approx(expected)


def test_m_sharpness_draws_a_random_ascent_for_each_group():
    same = jax.tree.map(lambda x: jnp.tile(x[:1], (4, 1)), net_batch())
    found = m_sharpness(
        cx.Objective(net_loss, same), net_params(), 0.1, 1, ascent=cx.random_direction(0)
    )
    assert len(set(np.asarray(found.groups))) == 4


# The surrogate gap.


def test_corrected_gap_on_a_quadratic_is_the_curvature_along_the_gradient():
    found = surrogate_gap(quadratic, POINT, 0.3)
    norm = np.linalg.norm(GRADIENT)
    along = GRADIENT @ MATRIX @ GRADIENT / norm**2
    gap = 0.3 * norm + 0.5 * 0.3**2 * along
    assert float(found.gap) == pytest.approx(gap, rel=1e-12)
    assert float(found.sigma_max) == pytest.approx(2 * gap / 0.09, rel=1e-12)
    assert float(found.sigma_max_corrected) == pytest.approx(along, rel=1e-11)
    assert float(found.gradient_norm) == pytest.approx(norm, rel=1e-12)


def test_gap_estimates_along_the_top_eigenvector_are_the_eigenvalue():
    values, vectors = np.linalg.eigh(MATRIX)
    near = {"w": jnp.asarray(1e-9 * vectors[:, -1])}
    found = surrogate_gap(quadratic, near, 0.1)
    for estimate in (found.sigma_max, found.sigma_max_corrected):
        assert float(estimate) == pytest.approx(values[-1], rel=1e-6)


def test_surrogate_gap_at_radius_zero_is_zero():
    found = surrogate_gap(quadratic, POINT, 0.0)
    assert (float(found.gap), float(found.sigma_max), float(found.sigma_max_corrected)) == (0, 0, 0)


def test_surrogate_gap_is_the_same_over_microbatches():
    whole = surrogate_gap(objective(), net_params(), 0.1)
    parts = surrogate_gap(cx.Objective(net_loss, net_batch(), microbatch=2), net_params(), 0.1)
    np.testing.assert_allclose(parts, whole, rtol=1e-9)


# Average case.


def test_random_sharpness_on_a_quadratic_is_the_mean_over_its_probes():
    z = np.random.default_rng(0).normal(size=(5, 3))
    expected = 0.2 * z @ GRADIENT + 0.5 * 0.04 * np.einsum("ni,ij,nj->n", z, MATRIX, z)
    found = random_sharpness(quadratic, POINT, 0.2, probes={"w": jnp.asarray(z)})
    np.testing.assert_allclose(found.differences, expected, rtol=1e-10)
    assert float(found.value) == pytest.approx(expected.mean(), rel=1e-12)
    error = expected.std(ddof=1) / 5**0.5
    assert float(found.standard_error) == pytest.approx(error, rel=1e-10)
    assert float(found.share) == pytest.approx(np.mean(expected >= 0))


def test_random_sharpness_at_a_minimum_is_half_the_trace():
    found = random_sharpness(quadratic, {"w": jnp.zeros(3)}, 0.1, draws=4000, chunk=500)
    error = float(found.value) - 0.005 * np.trace(MATRIX)
    assert abs(error) < 4 * float(found.standard_error)
    assert float(found.standard_error) < 0.03 * float(found.value)
    assert float(found.share) == 1


@pytest.mark.parametrize("chunk", [1, 4])
def test_normalised_perturbations_lie_on_the_sphere(chunk):
    bowl = lambda params: 1.5 * jnp.sum(params["w"] ** 2)
    found = random_sharpness(bowl, {"w": jnp.zeros(7)}, 0.2, normalised=True, chunk=chunk)
    np.testing.assert_allclose(found.differences, 1.5 * 0.04, rtol=1e-12)


def test_random_sharpness_draws_follow_the_key():
    runs = [random_sharpness(quadratic, POINT, 0.1, draws=3, key=key) for key in (0, 0, 1)]
    np.testing.assert_array_equal(runs[0].differences, runs[1].differences)
    assert not np.array_equal(runs[0].differences, runs[2].differences)
    assert np.isnan(random_sharpness(quadratic, POINT, 0.1, draws=1).standard_error)


# In training, and on devices.


def test_sharpness_measures_are_recorded_in_a_training_step():
    tx = cx.sam_perturb(0.1) | cx.record(
        gap=lambda signal, p, loss: surrogate_gap(loss, p, 0.1).gap,
        m_sharpness=lambda signal, p, loss: m_sharpness(loss, p, 0.1, 2).value,
        climb=lambda signal, p: signal.perturbed_value - signal.value,
    ) | optax.sgd(0.1)  # fmt: skip

    @jax.jit
    def step(params, batch):
        loss = cx.Objective(net_loss, batch)
        value, grads = loss.value_and_grad(params)
        _, state = tx.update(grads, tx.init(params), params, value_fn=loss, value=value)
        return cx.diagnostics(state)

    figures = step(net_params(), net_batch())
    for name in "gap", "climb":
        assert float(figures[name]) == pytest.approx(float(figures["surrogate_gap"]), rel=1e-5)
    expected = m_sharpness(objective(), net_params(), 0.1, 2).value
    assert float(figures["m_sharpness"]) == pytest.approx(float(expected), rel=1e-6)


MEASURES = {
    "sharpness": lambda o, p, **over: sharpness(o, p, 0.2, steps=2, **over).value,
    "surrogate_gap": lambda o, p, **over: surrogate_gap(o, p, 0.2, **over),
    "m_sharpness": lambda o, p, **over: m_sharpness(o, p, 0.2, 1, **over).value,
    "random_sharpness": lambda o, p, **over: random_sharpness(o, p, 0.2, draws=3, **over),
}


def on_devices(measure, check_vma, **over):
    """The measure on eight devices with two examples each, and on all sixteen."""
    batch, params = net_batch(16), net_params()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    run = lambda params, batch: measure(cx.Objective(net_loss, batch), params, **over)
    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=check_vma
    )
    return jax.jit(mapped)(params, batch), measure(cx.Objective(net_loss, batch), params)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", MEASURES)
def test_sharpness_over_devices_is_that_of_the_whole_batch(name, check_vma):
    found, expected = on_devices(MEASURES[name], check_vma, mean_over="data")
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-9)


@pytest.mark.parametrize("name", MEASURES)
def test_missing_mean_over_devices_is_refused(name):
    with pytest.raises(ValueError, match="mean_over='data'"):
        on_devices(MEASURES[name], True)


def test_each_device_can_keep_its_own_sharpness():
    batch, params = net_batch(16), net_params()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def run(params, batch):
        found = sharpness(cx.Objective(net_loss, batch), params, 0.2, mean_over=())
        return found.value[None]

    mapped = jax.shard_map(run, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    expected = m_sharpness(cx.Objective(net_loss, batch), params, 0.2, 2).groups
    np.testing.assert_allclose(jax.jit(mapped)(params, batch), expected, rtol=1e-12)


def test_logging_the_gap_costs_a_gradient_and_a_forward_pass():
    params, x = {"w": jnp.ones((3, 64, 64))}, jnp.ones((128, 64))

    def loss(params, x):
        for w in params["w"]:
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    def flops(f):
        costs = jax.jit(f).lower(params).compile().cost_analysis()
        assert costs is not None
        return costs["flops"]

    o = cx.Objective(loss, x)
    budget = flops(lambda p: o.value_and_grad(p)) + flops(o)
    assert flops(lambda p: surrogate_gap(o, p, 0.1)) <= 1.05 * budget
    assert flops(lambda p: sharpness(o, p, 0.1).value) <= 1.05 * budget


# Compiled once.


def test_eager_measure_compiles_once_for_a_loss_and_shapes():
    traced = []

    @compiled_once
    def measure(objective, params, scale, *, power):
        traced.append(power)
        return scale * objective(params) ** power

    loss = lambda params, batch: jnp.sum(params["w"]) * jnp.mean(batch)
    for batch in (jnp.ones(4), 2 * jnp.ones(4)):
        for scale in (1.0, 3.0):
            found = measure(cx.Objective(loss, batch), POINT, scale, power=2)
            assert float(found) == pytest.approx(scale * (-0.5 * float(batch[0])) ** 2)
    assert traced == [2]
    measure(cx.Objective(loss, jnp.ones(4)), POINT, 1.0, power=3)
    measure(cx.Objective(lambda p, b: loss(p, b), jnp.ones(4)), POINT, 1.0, power=3)
    measure(cx.Objective(loss, jnp.ones(4), microbatch=2), POINT, 1.0, power=3)
    assert traced == [2, 3, 3, 3]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sharpness(quadratic, POINT, -1.0), ValueError, "`rho` in"),
        (lambda: sharpness(quadratic, POINT, 0.1, p=0.5), ValueError, "p in"),
        (lambda: sharpness(quadratic, POINT, 0.1, steps=0), ValueError, "positive integer"),
        (
            lambda: m_sharpness(cx.Objective(quadratic), POINT, 0.1, 2),
            ValueError,
            "reads the batch",
        ),
        (lambda: m_sharpness(objective(), net_params(), 0.1, 3), ValueError, "divide"),
        (lambda: m_sharpness(objective(), net_params(), 0.1, 2, step=1), TypeError, "'step'"),
        (lambda: random_sharpness(quadratic, POINT, 0.1, draws=0), ValueError, "positive"),
        (lambda: surrogate_gap(quadratic, {"w": jnp.arange(3)}, 0.1), TypeError, "dtype"),
        (
            lambda: sharpness(quadratic, POINT, 0.1, steps=2, ascent=cx.fisher_ascent()),
            ValueError,
            "in a metric in one step",
        ),
    ],
)
def test_sharpness_errors_name_the_option(call, error, message):
    with pytest.raises(error, match=message):
        call()
