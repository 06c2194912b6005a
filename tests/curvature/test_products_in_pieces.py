"""Curvature products over microbatches, groups and devices equal those of the whole batch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, hard_targets
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from products import KEY, LOSS, PRODUCTS, applied, batch_of, direction, every_product
from small_problems import EXAMPLES, assert_trees_close, flat, net, net_batch, net_params, quick_jit

import curvax as cx
from curvax.curvature import fvp
from curvax.likelihoods import categorical

# Pieces of the batch.


@pytest.mark.parametrize("microbatch", [1, 2, EXAMPLES])
@every_product
def test_products_over_microbatches_equal_the_whole(name, microbatch):
    whole = cx.Objective(LOSS, batch_of(), model=net)
    pieces = cx.Objective(LOSS, batch_of(), model=net, microbatch=microbatch)
    assert_trees_close(applied(name, pieces), applied(name, whole), tol=1e-13)


def test_given_labels_are_split_with_the_batch():
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
def test_weighted_mean_of_group_products_is_the_whole(name):
    objective: Any = cx.Objective(LOSS, batch_of(), model=net)
    groups = objective.groups(2)
    parts = [
        objective.piece(jax.tree.map(lambda x, i=i: x[i], groups), i, EXAMPLES // 2)
        for i in range(EXAMPLES // 2)
    ]
    found = sum(part.batch_weight() * flat(applied(name, part)) for part in parts)
    expected = flat(applied(name, objective))
    np.testing.assert_allclose(found / objective.batch_weight(), expected, rtol=0, atol=1e-13)


def test_batch_weight_is_that_of_the_likelihood():
    of: Any = lambda loss, **options: cx.Objective(loss, batch_of(), model=net, **options)
    np.testing.assert_allclose(of(LOSS).batch_weight(), jnp.sum(batch_of()["w"]), rtol=1e-15)
    assert of(categorical("y")).batch_weight() is None
    np.testing.assert_array_equal(of(LOSS, weight=lambda batch: 3.0).batch_weight(), 3.0)


def test_example_keys_follow_the_place_in_the_whole_batch():
    objective = cx.Objective(LOSS, batch_of(), model=net)
    keys = objective.example_keys(KEY)
    assert len(np.unique(jax.random.key_data(keys), axis=0)) == EXAMPLES
    group = objective.piece(jax.tree.map(lambda x: x[2:4], batch_of()), 1, EXAMPLES // 2)
    assert_trees_close(group.example_keys(KEY), keys[2:4], tol=0)
    half = group.piece(jax.tree.map(lambda x: x[1:], group.batch), 1, 2)
    assert_trees_close(half.example_keys(KEY), keys[3:4], tol=0)


# Devices.

DEVICES = 8
MAPPINGS = ("pmap", "shard_map", "shard_map unchecked")
needs_devices = pytest.mark.skipif(
    jax.device_count() < DEVICES,
    reason="needs XLA_FLAGS=--xla_force_host_platform_device_count=8 before jax is imported",
)


def over_devices(mapping: str, f: Any, params: Any, batch: Any) -> Any:
    """`f(params, shard)` on every device, the same result on all."""
    if mapping == "pmap":
        shards = jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), batch)
        return jax.pmap(f, axis_name="d", in_axes=(None, 0), out_axes=None)(params, shards)
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
    specs: Any = dict(mesh=mesh, in_specs=(P(), P("d")), out_specs=P())
    return jax.jit(jax.shard_map(f, **specs, check_vma=mapping == "shard_map"))(params, batch)


@needs_devices
@pytest.mark.parametrize("mapping", MAPPINGS)
@every_product
def test_mean_of_products_over_devices_equals_the_whole(name, mapping):
    batch = batch_of(2 * DEVICES)

    def one_device(params: Any, shard: Any) -> Any:
        objective = cx.Objective(LOSS, shard, model=net, microbatch=1 if name == "drawn" else None)
        product = PRODUCTS[name](objective, params)
        mean = product.averaged(("d",), objective.batch_weight())
        root = mean.root
        through = None if root is None else root.transpose(root.forward(direction(params)))
        return mean(direction(params)), through

    found, through = over_devices(mapping, one_device, net_params(), batch)
    expected = applied(name, cx.Objective(LOSS, batch, model=net))
    assert_trees_close(found, expected, tol=1e-13)
    assert (through is None) == (name in ("hvp", "drawn"))
    if through is not None:
        assert_trees_close(through, expected, tol=1e-13)


@needs_devices
@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_drawn_alike_on_any_number_of_devices(family):
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
def test_explicitly_sharded_batch_gives_the_same_product(name):
    batch = batch_of(2 * DEVICES)
    expected = applied(name, cx.Objective(LOSS, batch, model=net))
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(batch, jax.sharding.NamedSharding(mesh, P("d")))
        run = lambda p, b: PRODUCTS[name](cx.Objective(LOSS, b, model=net), p)(direction(p))
        found = jax.jit(run)(net_params(), sharded)
    assert_trees_close(jax.device_get(found), jax.device_get(expected), tol=1e-13)
