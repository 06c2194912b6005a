"""The methods that two processes step with, and how: a module that both ends of the test import."""

from functools import partial
from typing import Any

import jax
import numpy as np
import optax
import test_devices as problem
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_devices import DEVICES, PER_DEVICE

import curvax as cx

KEY, LR, DAMPING = 3, 0.1, 0.5
AXIS, AXES = "batch", ("batch", "group")
SAM, GSAM = cx.sam_perturb(0.3), cx.sam_perturb(0.3) | cx.gsam_project(0.4)


def grouped(m, stages, axes=AXIS):
    return cx.per_group(m, stages) | cx.pmean_updates(axes) | optax.sgd(LR)


METHODS = {
    "SAM": cx.sam(optax.sgd(LR), 0.3, mean_over=AXIS),
    "SAM, synced": cx.sam(optax.sgd(LR), 0.3, sync_over=AXIS, mean_over=AXIS),
    "GSAM": cx.gsam(optax.sgd(LR), 0.3, 0.4, mean_over=AXIS),
    "groups of half a device": grouped(PER_DEVICE // 2, GSAM),
    "groups of two devices": grouped(2 * PER_DEVICE, SAM, AXES),
    "groups of eight devices": grouped(DEVICES * PER_DEVICE, GSAM, AXES),
    "AdaHessian": cx.adahessian(LR, b2=0.99, key=KEY, mean_over=AXIS),
    "AdaHessian, a probe for each device": problem.by_shard(KEY),
    "natural gradient": cx.natural_gradient(
        LR, damping=DAMPING, solver=cx.cg(60, tol=1e-15), mean_over=AXIS
    ),
}
GRIDS = {"groups of two devices": (4, 2), "groups of eight devices": (1, 8)}
"""Meshes whose last axis holds the devices of a group."""


def regimes_of(name):
    return ("shard_map",) if name in GRIDS else ("shard_map", "pmap")


def predict(params, batch):
    return jax.numpy.tanh(batch["x"] @ params["w1"] + params["b1"][None]) @ params["w2"]


def one_step(name, params, state, batch):
    if name != "natural gradient":
        return problem.one_step(METHODS[name], params, state, batch)
    objective = cx.Objective(cx.gaussian("y"), batch, model=predict)
    _, grads = objective.value_and_grad(params)
    updates, state = METHODS[name].update(grads, state, params, value_fn=objective)
    return optax.apply_updates(params, updates), state


def stepped(name, regime, steps=2):
    """What two steps of a method make of the parameters, as one vector."""
    params, batch = jax.tree.map(np.asarray, (problem.make_params(), problem.make_batch()))
    step = partial(one_step, name)
    if regime == "pmap":
        mapped = jax.pmap(step, axis_name=AXIS, in_axes=(None, None, 0), out_axes=None)
        state, count = METHODS[name].init(params), jax.local_device_count()
        first = count * jax.process_index()
        batch = jax.tree.map(lambda x: x[first : first + count], problem.shards(batch))
    else:
        axes, shape = (AXES, GRIDS[name]) if name in GRIDS else ((AXIS,), (DEVICES,))
        mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes))
        specs: Any = dict(in_specs=(P(), P(), P(axes)), out_specs=P())
        mapped = jax.jit(jax.shard_map(step, mesh=mesh, **specs))
        state = jax.jit(METHODS[name].init, out_shardings=NamedSharding(mesh, P()))(params)
    for _ in range(steps):
        params, state = mapped(params, state, batch)
    return np.asarray(problem.ravel(jax.device_get(params)))
