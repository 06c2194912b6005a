"""The methods that two processes step with, imported by the processes and by their test."""

from collections.abc import Callable
from functools import partial
from typing import Any

import device_problem as problem
import jax
import numpy as np
import optax
from device_problem import DEVICES, PER_DEVICE
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import curvax as cx

KEY, LR, DAMPING = 3, 0.1, 0.5
AXIS, AXES = "batch", ("batch", "group")
SAM, GSAM = cx.sam_perturb(0.3), cx.sam_perturb(0.3) | cx.gsam_project(0.4)


def grouped(m, stages):
    return lambda axes: cx.per_group(m, stages) | cx.pmean_updates(axes) | optax.sgd(LR)


METHODS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "SAM": lambda axes: cx.sam(optax.sgd(LR), 0.3, mean_over=axes),
    "SAM, synced": lambda axes: cx.sam(optax.sgd(LR), 0.3, sync_over=axes, mean_over=axes),
    "GSAM": lambda axes: cx.gsam(optax.sgd(LR), 0.3, 0.4, mean_over=axes),
    "groups of half a device": grouped(PER_DEVICE // 2, GSAM),
    "groups of two devices": grouped(2 * PER_DEVICE, SAM),
    "groups of eight devices": grouped(DEVICES * PER_DEVICE, GSAM),
    "AdaHessian": lambda axes: cx.adahessian(LR, b2=0.99, key=KEY, mean_over=axes),
    "AdaHessian, a probe for each device": lambda axes: problem.by_shard(KEY),
    "natural gradient": lambda axes: cx.natural_gradient(
        LR, damping=DAMPING, solver=cx.cg(60, tol=1e-15), mean_over=axes
    ),
}
"""The methods as functions of the axes that they average over."""
GRIDS = {"groups of two devices": (4, 2), "groups of eight devices": (1, 8)}
"""Meshes whose last axis holds the devices of a group."""
MAPPINGS = ("shard_map", "pmap")


def step_of(name, axes):
    """The method's initial state and its step."""
    tx = METHODS[name](axes)
    halves: Any = {}
    if name == "natural gradient":
        halves = dict(of=cx.gaussian("y"), model=problem.predict)
    return tx.init, partial(problem.one_step, tx, **halves)


def stepped(name, mapping, steps=2):
    """The parameters after two steps of a method, as one vector."""
    params, batch = jax.tree.map(np.asarray, (problem.make_params(), problem.make_batch()))
    gridded = name in GRIDS and mapping == "shard_map"
    axes, shape = (AXES, GRIDS[name]) if gridded else ((AXIS,), (DEVICES,))
    init, step = step_of(name, axes)
    if mapping == "pmap":
        mapped = jax.pmap(step, axis_name=AXIS, in_axes=(None, None, 0), out_axes=None)
        state, count = init(params), jax.local_device_count()
        first = count * jax.process_index()
        batch = jax.tree.map(lambda x: x[first : first + count], problem.shards(batch))
    else:
        mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes))
        specs: Any = dict(in_specs=(P(), P(), P(axes)), out_specs=P())
        mapped = jax.jit(jax.shard_map(step, mesh=mesh, **specs))
        state = jax.jit(init, out_shardings=NamedSharding(mesh, P()))(params)
    for _ in range(steps):
        params, state = mapped(params, state, batch)
    return np.asarray(problem.ravel(jax.device_get(params)))
