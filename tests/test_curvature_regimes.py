"""Curvature products in pieces, on devices and in other dtypes; their cost and their errors."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, hard_targets
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from small_problems import EXAMPLES, assert_trees_close, flat, net, net_batch, net_params, quick_jit

import curvax as cx
from curvax.curvature import (
    empirical_fvp,
    fvp,
    ggnvp,
    hvp,
    linearized_empirical_fisher,
    linearized_fisher,
    linearized_gauss_newton,
    linearized_hessian,
)
from curvax.curvature.gauss_newton import model_pass
from curvax.likelihoods import Likelihood, categorical
from curvax.objective import value_aux_and_grad

KEY = jax.random.key(7)
LOSS = categorical("y", weights="w")
PRODUCTS: dict[str, Any] = {
    "hvp": hvp,
    "ggnvp": ggnvp,
    "fvp": fvp,
    "drawn": partial(fvp, samples=3, key=KEY),
    "empirical": empirical_fvp,
}
every_product = pytest.mark.parametrize("name", PRODUCTS)


def batch_of(n: int = EXAMPLES, dtype: Any = jnp.float64) -> dict[str, Any]:
    w = jnp.linspace(0.5, 2.0, n).at[1].set(0.0)
    return dict(net_batch(n, dtype), y=hard_targets("categorical", n, 2), w=w.astype(dtype))


def direction(params: Any) -> Any:
    return jax.tree.map(lambda x: jnp.cos(7 * x), params)


def applied(name: str, objective: cx.Objective, params: Any = None) -> Any:
    params = net_params() if params is None else params
    return quick_jit(lambda p: PRODUCTS[name](objective, p)(direction(p)))(params)


# Pieces of the batch.


@pytest.mark.parametrize("microbatch", [1, 2, EXAMPLES])
@every_product
def test_micro_batches_equal_the_whole(name, microbatch):
    whole = cx.Objective(LOSS, batch_of(), model=net)
    pieces = cx.Objective(LOSS, batch_of(), model=net, microbatch=microbatch)
    assert_trees_close(applied(name, pieces), applied(name, whole), tol=1e-13)


def test_given_labels_are_cut_with_the_batch():
    labels = jnp.stack([batch_of()["y"], 1 - batch_of()["y"]])
    found, expected = (
        quick_jit(lambda p, o=objective: fvp(o, p, labels=labels)(direction(p)))(net_params())
        for objective in (
            cx.Objective(LOSS, batch_of(), model=net, microbatch=2),
            cx.Objective(LOSS, batch_of(), model=net),
        )
    )
    assert_trees_close(found, expected, tol=1e-13)


@every_product
def test_groups_average_to_the_whole_by_weight(name):
    objective: Any = cx.Objective(LOSS, batch_of(), model=net)
    groups = objective.groups(2)
    parts = [
        objective.piece(jax.tree.map(lambda x, i=i: x[i], groups), i, EXAMPLES // 2)
        for i in range(EXAMPLES // 2)
    ]
    found = sum(part.batch_weight() * flat(applied(name, part)) for part in parts)
    expected = flat(applied(name, objective))
    np.testing.assert_allclose(found / objective.batch_weight(), expected, rtol=0, atol=1e-13)


def test_the_weight_of_a_batch_is_that_of_its_likelihood():
    of: Any = lambda loss, **options: cx.Objective(loss, batch_of(), model=net, **options)
    np.testing.assert_allclose(of(LOSS).batch_weight(), jnp.sum(batch_of()["w"]), rtol=1e-15)
    assert of(categorical("y")).batch_weight() is None
    np.testing.assert_array_equal(of(LOSS, weight=lambda batch: 3.0).batch_weight(), 3.0)


def test_keys_of_examples_go_by_their_place_in_the_whole_batch():
    objective = cx.Objective(LOSS, batch_of(), model=net)
    keys = objective.example_keys(KEY)
    assert len(np.unique(jax.random.key_data(keys), axis=0)) == EXAMPLES
    group = objective.piece(jax.tree.map(lambda x: x[2:4], batch_of()), 1, EXAMPLES // 2)
    assert_trees_close(group.example_keys(KEY), keys[2:4], tol=0)
    half = group.piece(jax.tree.map(lambda x: x[1:], group.batch), 1, 2)
    assert_trees_close(half.example_keys(KEY), keys[3:4], tol=0)


# Devices.

DEVICES = 8
REGIMES = ("pmap", "shard_map", "shard_map unchecked")
needs_devices = pytest.mark.skipif(
    jax.device_count() < DEVICES,
    reason="needs XLA_FLAGS=--xla_force_host_platform_device_count=8 before jax is imported",
)


def over_devices(regime: str, f: Any, params: Any, batch: Any) -> Any:
    """`f(params, shard)` on every device, the same result on all."""
    if regime == "pmap":
        shards = jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), batch)
        return jax.pmap(f, axis_name="d", in_axes=(None, 0), out_axes=None)(params, shards)
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
    specs: Any = dict(mesh=mesh, in_specs=(P(), P("d")), out_specs=P())
    return jax.jit(jax.shard_map(f, **specs, check_vma=regime == "shard_map"))(params, batch)


@needs_devices
@pytest.mark.parametrize("regime", REGIMES)
@every_product
def test_the_mean_over_devices_equals_the_whole(name, regime):
    batch = batch_of(2 * DEVICES)

    def one_device(params: Any, shard: Any) -> Any:
        objective = cx.Objective(LOSS, shard, model=net, microbatch=1 if name == "drawn" else None)
        product = PRODUCTS[name](objective, params)
        mean = product.averaged(("d",), objective.batch_weight())
        root = mean.root
        through = None if root is None else root.transpose(root.forward(direction(params)))
        return mean(direction(params)), through

    found, through = over_devices(regime, one_device, net_params(), batch)
    expected = applied(name, cx.Objective(LOSS, batch, model=net))
    assert_trees_close(found, expected, tol=1e-13)
    assert (through is None) == (name in ("hvp", "drawn"))
    if through is not None:
        assert_trees_close(through, expected, tol=1e-13)


@needs_devices
@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_drawn_alike_on_any_devices(family):
    n = 2 * DEVICES
    batch = dict(net_batch(n), y=hard_targets(family, n, 2))
    product = lambda params, batch: fvp(
        cx.Objective(FAMILIES[family]("y"), batch, model=net), params, samples=2, key=KEY
    )

    def one_device(params: Any, shard: Any) -> Any:
        return product(params, shard).averaged(("d",))(direction(params))

    found = over_devices("shard_map", one_device, net_params(), batch)
    expected = quick_jit(lambda p: product(p, batch)(direction(p)))(net_params())
    assert_trees_close(found, expected, tol=1e-13)


@needs_devices
@every_product
def test_an_explicitly_sharded_batch_gives_the_same(name):
    batch = batch_of(2 * DEVICES)
    expected = applied(name, cx.Objective(LOSS, batch, model=net))
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(batch, jax.sharding.NamedSharding(mesh, P("d")))
        run = lambda p, b: PRODUCTS[name](cx.Objective(LOSS, b, model=net), p)(direction(p))
        found = jax.jit(run)(net_params(), sharded)
    assert_trees_close(jax.device_get(found), jax.device_get(expected), tol=1e-13)


# Roots.


@pytest.mark.parametrize("name", ["ggnvp", "fvp", "drawn", "empirical"])
def test_the_root_squares_to_the_product(name):
    objective, params = cx.Objective(LOSS, batch_of(), model=net), net_params()
    point, unravel = ravel_pytree(params)
    product = PRODUCTS[name](objective, params)
    root = product.root
    forward = lambda v: ravel_pytree(root.forward(unravel(v)))[0]
    rows = quick_jit(jax.vmap(forward, out_axes=1))(jnp.eye(point.size))
    columns = quick_jit(jax.vmap(lambda e: ravel_pytree(product(unravel(e)))[0]))(
        jnp.eye(point.size)
    )
    np.testing.assert_allclose(rows.T @ rows, columns, rtol=0, atol=1e-14)
    u = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size) * 1.0).reshape(x.shape), root.rows)
    pulled = rows.T @ ravel_pytree(u)[0]
    np.testing.assert_allclose(flat(root.transpose(u)), pulled, rtol=0, atol=1e-14)
    assert jax.eval_shape(root.forward, params) == root.rows


# The pass that comes with a product.

LINEARIZED: dict[str, Any] = {
    "hvp": linearized_hessian,
    "ggnvp": linearized_gauss_newton,
    "fvp": linearized_fisher,
    "drawn": partial(linearized_fisher, samples=3, key=KEY),
    "empirical": linearized_empirical_fisher,
}


def net_and_top(params: Any, batch: Any, key: jax.Array) -> Any:
    """Outputs under dropout, and a statistic of the batch."""
    kept = jax.random.bernoulli(key, 0.8, batch["x"].shape)
    return net(params, dict(batch, x=batch["x"] * kept)), {"top": jnp.max(batch["x"])}


@pytest.mark.parametrize("microbatch", [None, 2])
@every_product
def test_the_gradient_comes_with_the_product(name, microbatch):
    options: Any = dict(has_aux=True, key=jax.random.key(3), microbatch=microbatch)
    objective = cx.Objective(LOSS, batch_of(), model=net_and_top, **options)

    def both(params: Any) -> Any:
        out, product = LINEARIZED[name](objective, params)
        return out, product(direction(params))

    out, product = quick_jit(both)(net_params())
    assert_trees_close(out, value_aux_and_grad(objective, net_params()), tol=1e-14)
    assert_trees_close(product, applied(name, objective), tol=1e-14)


def test_a_pass_hands_out_outputs_and_pulls_back_what_lives_there():
    objective, params = cx.Objective(LOSS, batch_of(), model=net), net_params()
    whole = model_pass(objective, params)
    assert_trees_close(whole.outputs, net(params, batch_of()), tol=1e-15)
    cotangent = jnp.cos(whole.outputs)
    expected = jax.vjp(lambda p: net(p, batch_of()), params)[1](cotangent)[0]
    assert_trees_close(whole.pull(cotangent), expected, tol=1e-14)


# Models that JAX cannot enter forwards.


@jax.custom_vjp
def blocked_tanh(x: jax.Array) -> jax.Array:
    return jnp.tanh(x)


blocked_tanh.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g * (1 - blocked_tanh(x) ** 2),))


def blocked_net(params: Any, batch: Any) -> jax.Array:
    hidden = batch["x"] @ params["hidden"]["kernel"] + params["hidden"]["bias"][None, :]
    return blocked_tanh(hidden) @ params["out"]["kernel"]


def deep_net(params: Any, batch: Any, wrap: Any) -> jax.Array:
    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(x @ w), None

    x, _ = jax.lax.scan(wrap(layer), batch["x"], params["layers"])
    return x @ params["out"]


@pytest.mark.parametrize("microbatch", [None, 2])
@every_product
def test_a_custom_vjp_in_the_model_is_no_obstacle(name, microbatch):
    options: Any = dict(microbatch=microbatch)
    blocked = cx.Objective(LOSS, batch_of(), model=blocked_net, **options)
    expected = applied(name, cx.Objective(LOSS, batch_of(), model=net, **options))
    assert_trees_close(applied(name, blocked), expected, tol=1e-13)


@pytest.mark.parametrize("name", ["ggnvp", "empirical"])
def test_scanned_and_rematerialised_layers_change_nothing(name):
    layers = 0.5 * jax.random.normal(KEY, (3, 4, 4), jnp.float64)
    params = {"layers": layers, "out": layers[0, :, :2]}
    of = lambda wrap: cx.Objective(LOSS, batch_of(), model=partial(deep_net, wrap=wrap))
    found = applied(name, of(jax.checkpoint), params)
    assert_trees_close(found, applied(name, of(lambda f: f), params), tol=1e-14)


# Dtypes and structures.


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@every_product
def test_products_keep_the_dtypes_of_the_parameters(name, dtype):
    params = net_params(dtype)
    for microbatch in (None, 2):
        objective = cx.Objective(LOSS, batch_of(dtype=dtype), model=net, microbatch=microbatch)
        product = lambda p, o=objective: PRODUCTS[name](o, p)(net_params(jnp.float64))
        found = jax.eval_shape(product, params)
        assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(lambda x: x.dtype, params)


@every_product
def test_absent_leaves_stay_absent_and_no_leaf_is_fine(name):
    with_none = lambda params, batch: net(params["net"], batch)
    params = {"net": net_params(), "none": None}
    found = applied(name, cx.Objective(LOSS, batch_of(), model=with_none), params)
    assert found["none"] is None
    constant = lambda params, batch: batch["x"][:, :2]
    empty = cx.Objective(LOSS, batch_of(), model=constant)
    assert PRODUCTS[name](empty, {})({}) == {}


# Cost.


def wide_net(params: Any, batch: Any) -> jax.Array:
    x = batch["x"]
    for w in params[:-1]:
        x = jnp.tanh(x @ w)
    return x @ params[-1]


def flops(f: Any, *args: Any) -> float:
    costs: Any = quick_jit(f).lower(*args).compile().cost_analysis()
    return costs["flops"]


@pytest.fixture(scope="module")
def wide() -> Any:
    kernels = [(64, 128), (128, 128), (128, 128), (128, 10)]
    shapes = [jax.ShapeDtypeStruct(kernel, jnp.float32) for kernel in kernels]
    batch = {
        "x": jax.ShapeDtypeStruct((64, 64), jnp.float32),
        "y": jax.ShapeDtypeStruct((64,), jnp.int32),
    }
    objective = lambda batch: cx.Objective(categorical("y"), batch, model=wide_net)
    gradient = flops(lambda p, b: objective(b).value_and_grad(p), shapes, batch)
    return objective, shapes, batch, gradient


def applications(product: Any, objective: Any, count: int) -> Any:
    """(parameters, vectors, batch) ↦ several products of one linearisation."""

    def f(params: Any, vectors: Any, batch: Any) -> Any:
        apply = product(objective(batch), params)
        return [apply(v) for v in vectors[:count]]

    return f


@pytest.mark.parametrize("name", ["ggnvp", "drawn"])
def test_one_more_product_costs_at_most_1_4_gradients(name, wide):
    objective, shapes, batch, gradient = wide
    cost = lambda count: flops(
        applications(PRODUCTS[name], objective, count), shapes, [shapes] * 3, batch
    )
    # Of shared residuals the first product brings one forward pass, the others none.
    assert cost(3) - cost(2) < 1.4 * gradient
    assert cost(3) < (0.4 + 3 * 1.4) * gradient


def test_two_cotangents_and_the_gradient_cost_at_most_1_7_gradients(wide):
    objective, shapes, batch, gradient = wide

    def diagonal(params: Any, batch: Any) -> Any:
        whole = model_pass(objective(batch), params)
        likelihood = whole.objective.loss
        assert isinstance(likelihood, Likelihood)
        noise = likelihood.root(whole.outputs, batch, jnp.ones_like(whole.outputs))
        return whole.loss_and_gradient(), whole.pull(noise)

    assert flops(diagonal, shapes, batch) < 1.7 * gradient


@pytest.mark.parametrize("name", ["ggnvp", "drawn", "empirical"])
def test_memory_in_micro_batches_does_not_grow_with_the_batch(name):
    kernels = [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 4

    def memory(examples: int) -> float:
        batch = {
            "x": jax.ShapeDtypeStruct((examples, 64), jnp.float32),
            "y": jax.ShapeDtypeStruct((examples,), jnp.int32),
        }

        def product(params: Any, v: Any, batch: Any) -> Any:
            objective = cx.Objective(categorical("y"), batch, model=wide_net, microbatch=32)
            return PRODUCTS[name](objective, params)(v)

        analysis: Any = quick_jit(product).lower(kernels, kernels, batch).compile()
        return analysis.memory_analysis().temp_size_in_bytes

    # What grows is a key of 8 bytes for each of three draws; one layer's activations take 256.
    assert memory(1024) - memory(128) <= (1024 - 128) * 3 * 8


def test_the_model_is_traced_once_for_many_products():
    traces: list[None] = []

    def counted(params: Any, batch: Any) -> jax.Array:
        traces.append(None)
        return net(params, batch)

    for name in ("ggnvp", "drawn", "empirical"):
        product = PRODUCTS[name](cx.Objective(LOSS, batch_of(), model=counted), net_params())
        before = len(traces)
        for factor in (1.0, 2.0):
            product(jax.tree.map(lambda x, c=factor: c * x, net_params()))
        assert len(traces) == before, name
    assert len(traces) == 3


@pytest.mark.parametrize("microbatch", [None, 2])
@every_product
def test_matrix_products_are_computed_at_the_precision_asked_for(name, microbatch):
    params = net_params(jnp.float32)
    batch = batch_of(dtype=jnp.float32)
    objective = cx.Objective(LOSS, batch, model=net, microbatch=microbatch)
    for precision in ("highest", "default"):
        product = lambda v, p=precision: PRODUCTS[name](objective, params, precision=p)(v)
        program = str(jax.make_jaxpr(product)(params))
        asked_for = program.count(f"precision=(Precision.{precision.upper()}")
        assert program.count("dot_general[") == asked_for > 0


# Errors.


def told(error: Any, *words: str) -> Any:
    return pytest.raises(error, match="(?s)" + ".*".join(words))


@pytest.mark.parametrize("product", [ggnvp, fvp])
def test_model_and_loss_must_be_seen_apart(product):
    loss = lambda params, batch: jnp.mean(net(params, batch) ** 2)
    for objective in (cx.Objective(loss, batch_of()), lambda params: jnp.sum(params["out"] ** 2)):
        with told(ValueError, "two functions", "model=predict", "categorical"):
            product(objective, net_params())


def test_the_fisher_matrix_needs_a_likelihood():
    loss = lambda outputs, batch: jnp.mean(outputs**2)
    objective = cx.Objective(loss, batch_of(), model=net)
    with told(ValueError, "expectation", "categorical", "ggnvp", "empirical_fvp"):
        fvp(objective, net_params())


def test_the_empirical_fisher_needs_a_batch():
    with told(ValueError, "empirical_fvp", r"Objective\(loss, batch\)"):
        empirical_fvp(lambda params: jnp.sum(params["out"]["kernel"]), net_params())


def test_draws_are_asked_for_in_one_way():
    objective = cx.Objective(LOSS, batch_of(), model=net)
    for error, options, words in (
        (ValueError, dict(samples=2), ("one of the two", "key=")),
        (ValueError, dict(key=KEY), ("one of the two", "exact")),
        (ValueError, dict(samples=0, key=KEY), ("samples", "positive")),
        (TypeError, dict(samples=1, key=0), ("fvp", "typed key")),
        (ValueError, dict(labels=batch_of()["y"], key=KEY), ("either", "labels")),
        (ValueError, dict(labels=jnp.zeros((2, 3), int)), (r"\[8\]", r"\[2, 3\]")),
    ):
        with told(error, *words):
            fvp(objective, net_params(), **options)


def test_a_vector_of_another_structure_is_refused():
    for name in PRODUCTS:
        product = PRODUCTS[name](cx.Objective(LOSS, batch_of(), model=net), net_params())
        with told(ValueError, "structure", "hidden"):
            product({"out": jnp.zeros(3)})
