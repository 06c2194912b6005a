"""Every measure on linen, nnx and Equinox models, and on a sharded batch, as on plain arrays."""

import inspect
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from small_problems import flat, net, net_batch, net_params

import curvax as cx
from curvax import analysis
from curvax.flax_bridge import nnx_loss

LABEL = cx.gaussian("y")


def gradient(objective, params):
    return objective.value_and_grad(params)[1]


def waves(params):
    """Two trees made of the parameters number by number, in whatever order they are."""
    return jax.tree.map(lambda x: jnp.stack([jnp.sin(9 * x), jnp.cos(9 * x)]), params)


def block_values(objective, params):
    found = analysis.block_eigenvalues(objective, params, ["hidden", "out"])
    return [found[name].value for name in ("hidden", "out")]


MEASURES = {
    "sharpness": lambda o, p: analysis.sharpness(o, p, 0.2, steps=2),
    "m_sharpness": lambda o, p: analysis.m_sharpness(o, p, 0.2, 2, chunk=4),
    "surrogate_gap": lambda o, p: analysis.surrogate_gap(o, p, 0.2),
    "random_sharpness": lambda o, p: analysis.random_sharpness(o, p, 0.2, probes=waves(p)),
    "ntk": lambda o, p: analysis.ntk(o, p, form="trace", chunk=4),
    "fisher_kl": lambda o, p: analysis.fisher_kl(o, p, jax.tree.map(jnp.sin, p)),
    "landscape": lambda o, p: analysis.landscape(o, p, gradient(o, p), points=3).losses,
    "gradient_angle": lambda o, p: analysis.gradient_angle(o, p, 0.2),
    "alignment": lambda o, p: analysis.alignment(gradient(o, p), p).share,
    "top_eigenpairs": lambda o, p: analysis.top_eigenpairs(o, p, 3).values,
    "block_eigenvalues": block_values,
    "hessian_spectrum": lambda o, p: analysis.hessian_spectrum(o, p, probes=waves(p), steps=6)[1:],
    "curvature_trace": lambda o, p: analysis.curvature_trace(o, p, probes=waves(p)).mean,
    "ntk_condition_number": lambda o, p: analysis.ntk_condition_number(o, p).value,
}


ELSEWHERE = ("m_sharpness", "ntk", "ntk_condition_number", "block_eigenvalues", "top_eigenpairs")
"""Measures without a `DatasetLoss`, and those tested over one in their own module."""


def plain(batch):
    return cx.Objective(LABEL, batch, model=net), net_params()


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.tanh(nn.Dense(3, param_dtype=x.dtype, name="hidden")(x))
        return nn.Dense(2, use_bias=False, param_dtype=x.dtype, name="out")(h)


def linen(batch):
    model = lambda params, batch: Linen().apply({"params": params}, batch["x"])
    return cx.Objective(LABEL, batch, model=model), net_params()


class Nnx(nnx.Module):
    def __init__(self):
        self.hidden = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        self.out = nnx.Linear(3, 2, use_bias=False, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.out(jnp.tanh(self.hidden(x)))


def of_nnx(batch):
    predict, params = nnx_loss(Nnx(), lambda model, batch: model(batch["x"]))
    params = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(net_params()))
    return cx.Objective(LABEL, batch, model=predict, has_aux=True), params


class Equinox(eqx.Module):
    hidden: eqx.nn.Linear
    out: eqx.nn.Linear

    def __init__(self):
        weights = net_params()
        key = jax.random.key(0)
        at = lambda linear: (linear.weight, linear.bias)
        hidden, out = weights["hidden"], weights["out"]
        self.hidden = eqx.tree_at(
            at, eqx.nn.Linear(4, 3, key=key), (hidden["kernel"].T, hidden["bias"])
        )
        plain = eqx.nn.Linear(3, 2, use_bias=False, key=key)
        self.out = eqx.tree_at(lambda linear: linear.weight, plain, out["kernel"].T)

    def __call__(self, x):
        return self.out(jnp.tanh(self.hidden(x)))


def equinox(batch):
    params, static = eqx.partition(Equinox(), eqx.is_inexact_array)
    model = lambda params, batch: jax.vmap(eqx.combine(params, static))(batch["x"])
    return cx.Objective(LABEL, batch, model=model), params


@pytest.mark.parametrize("framework", [linen, of_nnx, equinox], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", MEASURES)
def test_measures_of_a_framework_model_equal_those_of_plain_arrays(name, framework):
    found = MEASURES[name](*framework(net_batch()))
    expected = MEASURES[name](*plain(net_batch()))
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MEASURES)
def test_measures_on_a_sharded_batch_equal_those_on_one_device(name):
    objective, params = plain(net_batch(16))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    batch = jax.device_put(objective.batch, NamedSharding(mesh, PartitionSpec("data")))
    run = jax.jit(lambda params, batch: MEASURES[name](objective.on(batch), params))
    expected = MEASURES[name](objective, params)
    np.testing.assert_allclose(flat(run(params, batch)), flat(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", analysis.__all__)
def test_every_public_name_and_option_is_documented(name):
    thing = getattr(analysis, name)
    documentation = inspect.getdoc(thing) or ""
    assert len(documentation.partition("\n")[0]) > 20
    if inspect.isfunction(thing):
        sections = re.findall(r"^(\w+):$", documentation, re.MULTILINE)
        assert sections == ["Args", "Returns", "Raises", "Examples"]
        about = documentation.partition("Args:")[2]
        options = inspect.signature(thing).parameters
        missing = [o for o in options if not re.search(rf"^ +.*\b{o}\b.*:", about, re.MULTILINE)]
        assert not missing


def test_measures_over_a_loader_equal_those_of_the_whole_set():
    objective, params = plain(net_batch(10))
    loader = [jax.tree.map(lambda x, r=r: x[r], objective.batch) for r in (slice(8), slice(8, 10))]
    dataset_loss = analysis.DatasetLoss(LABEL, loader, model=net)
    for name, measure in MEASURES.items():
        if name not in ELSEWHERE:
            found, expected = measure(dataset_loss, params), measure(objective, params)
            np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-9, err_msg=name)
    model = lambda params, batch: jax.nn.relu(net(params, batch))
    shares = analysis.active_fraction(analysis.DatasetLoss(LABEL, loader, model=model), params)
    expected = analysis.active_fraction(cx.Objective(LABEL, objective.batch, model=model), params)
    assert float(shares["relu"]) == pytest.approx(float(expected["relu"]))
