"""The neural tangent kernel and its condition number, against recorded and naive ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding, PartitionSpec
from recorded_curvature import read
from small_problems import net, net_batch, net_params
from trajectories import recorded

import curvax as cx
from curvax.analysis import jacobians, ntk, ntk_condition_number

recorded_runs = pytest.mark.parametrize("path", recorded("curvature_*"))
forms = pytest.mark.parametrize("form", ["full", "trace"])


def first_rows(run, n=16):
    """The recorded kernels are those of the first rows."""
    objective = run.objective()
    return objective.on(jax.tree.map(lambda x: x[:n], objective.batch))


def objective_of(model=net, batch=None, **options):
    loss = lambda outputs, batch: jnp.mean(outputs)
    return cx.Objective(loss, net_batch() if batch is None else batch, model=model, **options)


def naive_kernel(model, params, batch):
    """[nC, nC] from the Jacobian of the whole batch."""
    flat, unravel = ravel_pytree(params)
    rows = jax.jacfwd(lambda v: model(unravel(v), batch).ravel())(flat)
    return np.asarray(rows @ rows.T)


@recorded_runs
@forms
@pytest.mark.parametrize("chunk", [None, 4])
def test_ntk_is_the_recorded_kernel(path, form, chunk):
    run = read(path)
    found = ntk(first_rows(run), run.params, form=form, chunk=chunk)
    np.testing.assert_allclose(found, run.arrays[f"ntk/{form}"], rtol=0, atol=1e-12)


@recorded_runs
@forms
@pytest.mark.parametrize("method", ["dense", "lanczos"])
def test_condition_number_is_the_recorded_one(path, form, method):
    run = read(path)
    found = ntk_condition_number(first_rows(run), run.params, form=form, method=method)
    assert found.converged
    assert float(found.value) == pytest.approx(float(run.arrays[f"ntk/{form}_cond"]), rel=1e-8)
    spectrum = run.arrays[f"ntk/{form}_eigvals"]
    np.testing.assert_allclose(found.largest, spectrum.max(), rtol=1e-12)
    np.testing.assert_allclose(found.smallest, spectrum.min(), rtol=1e-9)


def test_lanczos_in_chunks_finds_the_dense_condition_number():
    objective, params = objective_of(), net_params()
    dense = ntk_condition_number(objective, params, method="dense")
    for given in ({"chunk": 2}, {"form": "full"}):
        found = ntk_condition_number(objective, params, method="lanczos", **given)
        assert float(found.value) == pytest.approx(float(dense.value), rel=1e-9)


def test_ntk_of_outputs_with_several_axes_is_the_naive_kernel():
    model = lambda params, batch: net(params, batch)[:, None] * jnp.arange(1.0, 4.0)[None, :, None]
    found = ntk(objective_of(model), net_params(), chunk=2)
    assert found.shape == (8, 6, 8, 6)
    expected = naive_kernel(model, net_params(), net_batch())
    np.testing.assert_allclose(found.reshape(48, 48), expected, atol=1e-12)


def test_default_chunk_fits_the_memory_limit(monkeypatch):
    objective, params = objective_of(), net_params()
    whole = ntk(objective, params)
    monkeypatch.setattr(jacobians, "NUMBERS", 2 * 21 * 5)
    assert jacobians.fitting_chunk(objective, params) == 4
    model = lambda params, batch: net(params, batch)
    np.testing.assert_allclose(ntk(objective_of(model), params), whole, atol=1e-13)


def test_a_repeated_example_makes_the_kernel_singular():
    batch = jax.tree.map(lambda x: jnp.concatenate([x[:3], x[:1]]), net_batch())
    found = ntk_condition_number(objective_of(batch=batch), net_params(), form="trace")
    assert float(found.value) > 1e14
    assert not found.converged


def test_ntk_refuses_batch_norm_in_training_mode_and_takes_it_frozen():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(2)(nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x)))

    variables = Normed().init(jax.random.key(0), net_batch()["x"], train=False)
    params, stats = variables["params"], variables["batch_stats"]

    def model(train):
        def predict(params, batch):
            out = Normed().apply(
                {"params": params, "batch_stats": stats}, batch["x"], train,
                mutable=["batch_stats"] if train else False,
            )  # fmt: skip
            return out[0] if train else out

        return predict

    for measure in (ntk, ntk_condition_number):
        with pytest.raises(ValueError, match="Freeze batch norm"):
            measure(objective_of(model(True)), params)
    found = ntk(objective_of(model(False)), params)
    expected = naive_kernel(model(False), params, net_batch())
    np.testing.assert_allclose(found.reshape(16, 16), expected, atol=1e-5)


def test_ntk_of_half_precision_parameters_is_float32():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), net_params())
    batch = jax.tree.map(lambda x: x.astype(jnp.bfloat16), net_batch())
    found = ntk(objective_of(batch=batch), half)
    assert found.dtype == jnp.float32
    exact = ntk(objective_of(), net_params())
    np.testing.assert_allclose(found, exact, atol=0.05 * float(jnp.max(exact)))


def test_ntk_compiles_once_and_is_the_same_on_a_sharded_batch():
    traces: list[None] = []

    def model(params, batch):
        traces.append(None)
        return net(params, batch)

    objective, params = objective_of(model), net_params()
    alone = ntk(objective, params)
    seen = len(traces)
    again = ntk(objective.on(net_batch()), jax.tree.map(lambda x: 2 * x, params))
    assert len(traces) == seen
    assert not np.allclose(again, alone)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    batch = jax.device_put(net_batch(), NamedSharding(mesh, PartitionSpec("data")))
    sharded = jax.jit(lambda params, batch: ntk(objective.on(batch), params))(params, batch)
    np.testing.assert_allclose(sharded, alone, atol=1e-13)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "diagonal"}, "takes `form` as one of"),
        ({"chunk": 3}, "does not divide its 8"),
        ({"method": "power"}, "takes `method` as one of"),
    ],
)
def test_ntk_errors_name_the_option(options, message):
    measure = ntk_condition_number if "method" in options else ntk
    with pytest.raises(ValueError, match=message):
        measure(objective_of(), net_params(), **options)
    with pytest.raises(ValueError, match="needs the model and the loss of its outputs"):
        measure(cx.Objective(lambda p, b: jnp.zeros(()), net_batch()), net_params())
