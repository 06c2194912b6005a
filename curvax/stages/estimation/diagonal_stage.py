"""Parts that the estimators share: the stage around an estimate, parts of the batch, shards."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.safe_math import root
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Key, ValueFn
from curvax.devices import axes, meshes
from curvax.devices.axes import AxisNames
from curvax.objective import (
    Objective,
    as_objective,
    first_part,
    microbatching,
    refuse_exchange,
    refuse_joined,
    require_batch,
)
from curvax.pipes.diagnostics import Flags, Metrics, StageMetrics, metrics_of, no_metrics
from curvax.pipes.signal import Signal, Stage, stage
from curvax.pipes.state_keys import DrawingKey


class Curvature(NamedTuple):
    """One estimate, with the loss and the gradient from the same pass."""

    diagonal: Tree
    variance: Tree
    loss: tuple[jax.Array, Any]
    gradient: Tree


Estimate = Callable[[Objective, Tree, jax.Array, tuple[str, ...]], Curvature]
"""(objective, parameters, key, device axes to average over within) ↦ one estimate."""


class EstimateState(NamedTuple):
    key: jax.Array
    """The data of a key, uint32. Draws depend on the step and the place in the global batch."""
    step: jax.Array
    """Number of estimates so far, int32 scalar."""
    measured: Flags
    figures: Metrics
    """`diagonal_relative_error`, with two probes or more."""


def diagonal_stage(
    name: str,
    estimate: Estimate,
    key: Key,
    probes: int,
    fraction: float,
    shards: int,
    mean_over: AxisNames,
    needs: Callable[[Objective], object] = lambda objective: None,
) -> Stage:
    """A stage that sets `diagonal` from random estimates; `needs` checks the objective."""
    checks.check_count(name, probes=probes, shards=shards)
    checks.check_fraction(fraction, name)
    drawing = DrawingKey(key)

    def init(params: Tree) -> EstimateState:
        trees.require_floating(params, name)
        metrics = no_metrics(*["diagonal_relative_error"] * (probes > 1))
        return EstimateState(drawing.initial(), jnp.zeros((), jnp.int32), *metrics)

    def rule(
        signal: Signal,
        state: EstimateState,
        params: Tree,
        *,
        value_fn: ValueFn | None = None,
        **extra: Any,
    ) -> tuple[Signal, EstimateState]:
        del extra
        objective = as_objective(value_fn, name, params)
        needs(objective)
        here, local, over = part_and_axes(signal, objective, params, fraction, mean_over, name)
        # One shard: the devices' gradients are averaged before the square. More: after it.
        within = over if shards == 1 else ()
        of_shard = lambda part, params, k: estimate(part, params, k, within)
        step_key = jax.random.fold_in(drawing.of(state.key), state.step)
        found, whole = over_shards(of_shard, here, params, step_key, shards, local, name)
        diagonal, variance = axes.mean((found.diagonal, found.variance), over, here.batch_weight())
        if shards > 1:  # The devices draw independently, so the variance of their mean is 1/n.
            variance = trees.scale(1 / axes.index_and_size(over)[1], variance)
        signal = signal._replace(diagonal=diagonal)
        if whole and fraction == 1:
            signal = share_gradient(signal, objective, params, found.loss, found.gradient, local)
        metrics = no_metrics() if probes == 1 else relative_error(diagonal, variance)
        return signal, EstimateState(state.key, state.step + 1, *metrics)

    return stage(init, rule, name=name)


def part_and_axes(
    signal: Signal,
    objective: Objective,
    params: Tree,
    fraction: float,
    mean_over: AxisNames,
    name: str,
) -> tuple[Objective, frozenset[str], tuple[str, ...]]:
    """(the loss on its part of the batch, the axes it is local to, the axes to average over)."""
    local = objective.local_axes(params)
    checks.refuse_split(params, objective, stage=name)
    checks.refuse_summed(signal.updates, local - signal.averaged, stage=name)
    over = checks.averaged_axes(mean_over, local, stage=name)
    return first_part(objective, fraction, name), local, over


def share_gradient(
    signal: Signal,
    objective: Objective,
    params: Tree,
    loss: tuple[jax.Array, Any],
    gradient: Tree,
    local: frozenset[str],
) -> Signal:
    """Replaces the updates by the estimator's own gradient if they are the gradient of the
    objective.

    The values are the same; the caller's backward pass is then unused, and the compiler drops it.
    """
    value, aux = loss
    if objective.cached_gradient(params, signal.updates) is None:
        return signal if signal.value is not None else signal._replace(value=value, aux=aux)
    gradient = jax.tree.map(lambda own, u: own.astype(u.dtype), gradient, signal.updates)
    return signal._replace(updates=gradient, gradient=gradient, value=value, aux=aux, local=local)


def over_shards(
    estimate: Callable[[Objective, Tree, jax.Array], Curvature],
    objective: Objective,
    params: Tree,
    key: jax.Array,
    shards: int,
    local: frozenset[str],
    name: str,
) -> tuple[Curvature, bool]:
    """The mean of one estimate per shard, and whether the device had a single shard."""
    if shards == 1:
        return estimate(objective, params, key), True
    refuse_joined(objective.joined)
    # Inside `per_group` shards divide the group, which has its own key, not the global batch.
    over = () if objective.grouped else tuple(a for a in axes.manual() if a in local)
    device, devices = axes.index_and_size(over)
    if shards % devices:
        raise ValueError(
            f"`{name}(shards={shards})` divides the global batch into equal parts, and "
            f"{shards} is not a multiple of the {devices} devices. Use a multiple."
        )
    here = shards // devices
    if devices > 1:
        refuse_exchange(objective, params, over, name)
    if here == 1:
        return estimate(objective, params, jax.random.fold_in(key, device)), True
    objective = require_batch(objective, f"{name}(shards=)")
    microbatching.check_divides(objective.size, here, f"`{name}(shards={shards})`")

    def piece(i: jax.Array, batch: Tree, params: Tree) -> tuple[Curvature, jax.Array | None]:
        part = objective.piece(batch, i, here)
        own = jax.random.fold_in(key, device * here + i)
        return estimate(part, params, own), part.batch_weight()

    groups = objective.groups(objective.size // here)
    found = microbatching.mean_over_vmap(piece, groups, here, params)
    lay = lambda tree: meshes.laid_like(tree, params)
    found = found._replace(diagonal=lay(found.diagonal), gradient=lay(found.gradient))
    if jax.tree.leaves(found.variance):
        found = found._replace(variance=lay(found.variance))
    return found._replace(variance=trees.scale(1 / here, found.variance)), False


def relative_error(diagonal: Tree, variance: Tree) -> StageMetrics:
    """The metric ‖σ‖/‖D‖."""
    error = trees.ratio(root(trees.total(variance)), trees.norm(diagonal))
    return metrics_of({"diagonal_relative_error": error})
