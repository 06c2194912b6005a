"""Spectra over devices and of sharded batches equal those on one device."""

import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from device_problem import DEVICES, MAPPINGS, mesh, shards
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from small_problems import dense_hessian, net, net_batch, net_loss, net_params, quick_jit

import curvax as cx
from curvax.analysis import curvature_trace, hessian_spectrum, top_eigenpairs

# Devices.


def measured(params: Any, batch: Any, mean_over: Any = None) -> tuple[Any, ...]:
    objective = cx.Objective(cx.gaussian("y", weights="w"), batch, model=net)
    options: Any = dict(mean_over=mean_over, key=1)
    pairs = top_eigenpairs(objective, params, 2, **options)
    spectrum = hessian_spectrum(objective, params, probes=2, steps=4, **options)
    trace = curvature_trace(objective, params, curvature="gauss_newton", probes=3, **options)
    return pairs.values, pairs.residuals, spectrum.density, trace


def weighted_batch() -> Any:
    return net_batch(2 * DEVICES) | {"w": 1.0 + jnp.arange(2 * DEVICES) % 5}


@functools.cache
def on_one_device() -> Any:
    return quick_jit(measured)(net_params(), weighted_batch())


def assert_as_on_one_device(found: Any) -> None:
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(on_one_device())):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9)


needs_devices = pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs eight devices")


@needs_devices
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_averaged_over_devices_the_spectrum_is_that_of_the_whole_batch(mapping):
    f = partial(measured, mean_over="batch")
    if mapping == "pmap":
        mapped = jax.pmap(f, axis_name="batch", in_axes=(None, 0), out_axes=None)
        assert_as_on_one_device(mapped(net_params(), shards(weighted_batch())))
    else:
        specs: Any = dict(in_specs=(P(), P("batch")), out_specs=P())
        checked = mapping == "shard_map"
        mapped = quick_jit(jax.shard_map(f, mesh=mesh(), check_vma=checked, **specs))
        assert_as_on_one_device(mapped(net_params(), weighted_batch()))


@needs_devices
@pytest.mark.parametrize("mapping", ["shard_map", "unchecked"])
def test_each_device_can_keep_the_spectrum_of_its_own_examples(mapping):
    def own(params: Any, batch: Any) -> Any:
        power = top_eigenpairs(
            cx.Objective(net_loss, batch), params, method="power", end="largest", mean_over=()
        )
        return jax.tree.map(lambda x: x[None], (measured(params, batch, ()), power.values))

    batch, checked = weighted_batch(), mapping == "shard_map"
    specs: Any = dict(in_specs=(P(), P("batch")), out_specs=P("batch"))
    mapped = quick_jit(jax.shard_map(own, mesh=mesh(), check_vma=checked, **specs))
    (found, power) = mapped(net_params(), batch)
    for number in 0, DEVICES - 1:
        part = jax.tree.map(lambda x, i=number: x[2 * i : 2 * i + 2], batch)
        expected = quick_jit(measured)(net_params(), part)
        at = jax.tree.map(lambda x, i=number: x[i], found)
        for x, y in zip(jax.tree.leaves(at), jax.tree.leaves(expected)):
            np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9)
        dense = dense_hessian(partial(net_loss, batch=part), net_params())
        np.testing.assert_allclose(power[number], np.linalg.eigvalsh(dense)[-1:], rtol=1e-8)


def sharded(kind: AxisType) -> tuple[Any, Any, Any]:
    """(mesh, replicated parameters, a batch that is cut)"""
    where = jax.make_mesh((DEVICES,), ("batch",), axis_types=(kind,))
    place = lambda tree, spec: jax.device_put(tree, NamedSharding(where, spec))
    return where, place(net_params(), P()), place(weighted_batch(), P("batch"))


@needs_devices
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_batch_gives_the_numbers_of_one_device(kind):
    where, params, batch = sharded(kind)
    with jax.set_mesh(where):
        assert_as_on_one_device(quick_jit(measured)(params, batch))


@needs_devices
def test_sharded_batch_without_jit_gives_the_numbers_of_one_device():
    _, params, batch = sharded(AxisType.Auto)
    objective = cx.Objective(cx.gaussian("y", weights="w"), batch, model=net)
    trace = curvature_trace(objective, params, curvature="gauss_newton", probes=3, key=1)
    np.testing.assert_allclose(trace, on_one_device()[-1], rtol=1e-12)


@needs_devices
def test_missing_mean_over_raises_under_pmap():
    with pytest.raises(ValueError, match="mean_over='batch'"):
        jax.pmap(measured, axis_name="batch", in_axes=(None, 0))(
            net_params(), shards(weighted_batch())
        )
