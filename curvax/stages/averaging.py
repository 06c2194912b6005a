"""Averages: over devices, and over groups of examples that each take the stages on their own."""

from typing import Any

import jax
import optax
from jax import lax

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree, is_float
from curvax.devices import axes, meshes
from curvax.devices.axes import AxisNames
from curvax.hyperparameters import injectable
from curvax.objective import Objective, as_objective, microbatching, require_batch
from curvax.pipes import order
from curvax.pipes.signal import Signal, Stage, pipe, stage, weight_of
from curvax.pipes.state_keys import StateKeys


def pmean_updates(axis_name: AxisNames) -> Stage:
    """Averages updates, clean gradient and losses over device axes: what follows sees the mean.

    What later stages do not use is dropped by the compiler, and what is the same on every device
    already costs nothing. Where the objective has a weight, devices count by it.

    Args:
        axis_name: an axis name or a tuple of them; `()` says that each device is meant to go on
            with its own. The identity where no axis is bound, so that one text serves jit, pmap
            and shard_map.

    Returns:
        A stage.

    Raises:
        ValueError: at update, the axis is not bound while others are; or it is None and the
            updates are local.
    """

    def rule(
        signal: Signal, state: Any, params: Tree, *, value_fn: Any = None, **extra: Any
    ) -> Any:
        del extra
        local = signal.local
        if axis_name is None and value_fn is not None:
            local = local | as_objective(value_fn, "pmean_updates").local_axes(params)
        over = checks.averaged_axes(axis_name, local, stage="pmean_updates", partly=True)
        weight = weight_of(signal, value_fn, over, "pmean_updates")
        remaining = signal.local - set(over) if over else frozenset()
        return _mean(signal, over, weight)._replace(local=remaining), state

    return stage(lambda params: optax.EmptyState(), rule, evaluates_loss=False, complex_leaves=True)


def _mean(signal: Signal, over: tuple[str, ...], weight: jax.Array | None) -> Signal:
    """Updates, clean gradient and losses as their means over bound device axes."""
    mean = lambda tree: axes.mean(tree, over, weight)
    same = trees.same_leaves(signal.gradient, signal.updates)
    updates = mean(signal.updates)
    gradient = updates if same else mean(signal.gradient)
    value, perturbed_value = mean((signal.value, signal.perturbed_value))
    return signal._replace(
        updates=updates, gradient=gradient, value=value, perturbed_value=perturbed_value,
        averaged=signal.averaged.union(over),
    )  # fmt: skip


@injectable
def per_group(m: int, stages: optax.GradientTransformation, *, sequential: bool = False) -> Stage:
    """m-sharpness: groups of m examples each take the stages on their own, then the mean.

        u = 1/G Σ_g stages(∇L_g(θ)),   L_g the loss of the g-th contiguous group

    `per_group(m, sam_perturb(rho) | gsam_project(alpha)) | optax.adamw(lr)` perturbs and projects
    for every m examples, whatever the number of devices. Each group starts from the one state kept,
    with keys of its own; afterwards moments and metrics are averaged, and counts and keys advance
    once. The gradient that the caller computed is not used, and compiles to nothing. Of curvature a
    diagonal is handed on, but not where devices count by weights, since they may share it. The aux
    is that of the whole batch, as with micro-batches. Foret et al., SAM, arXiv:2010.01412, section
    4.1.

    On a mesh of explicit axes groups that come out even on the devices stay there: one sum of the
    parameters' size between devices, and parameters that are split along the axes of the batch
    (FSDP) are gathered once before. Fewer groups than devices, or a model that names the axis of
    the batch, have every device work on its part of each group: a sum for each group and pass, and
    the batch is moved once. Where neither the groups nor their examples come out even, devices
    repeat each other's work.

    Args:
        m: examples in a group; divides the batch. Under device axes it divides the batch of each
            device, or is that of neighbouring devices: all along the last axes that split the batch
            (`jax.make_mesh((4, 2), ("batch", "group"))`, in the order of the mesh), or, under
            `pmap`, so many in a row. The ascent then starts from the mean gradient of the group.
            With `check_vma=False`, which hides what splits the batch, every axis of the mesh
            counts as doing so.
        stages: a stage, a pipe, or a plain transformation.
        sequential: one group at a time, in the memory of one, instead of all at once.

    Returns:
        A stage that needs an `Objective` with a batch.

    Raises:
        ValueError, TypeError: m < 1, or traced; at update, one that does not divide the batch, or
            spans devices that no axes hold, or stages that look into a group of several.
    """
    checks.check_count("per_group", m=m)
    inner = pipe(stages)
    over_groups = microbatching.mean_over_scan if sequential else microbatching.mean_over_vmap

    def rule(
        signal: Signal, state: Any, params: Tree, *, value_fn: Any = None, **extra: Any
    ) -> tuple[Signal, Any]:
        objective = require_batch(as_objective(value_fn, "per_group", params), "per_group")
        order.refuse_changed_in_pipe(signal.updates, signal.gradient, "per_group")
        within = _devices_of_a_group(m, objective)
        here = objective.size if within else m
        groups = objective.groups(here, f"`per_group({m}, ...)`")
        objective = objective.together(within)
        local = objective.local_axes(params)
        weight, count = objective.batch_weight(), objective.size // here
        first, shards = objective.shard_number(local)
        batch_of_all = objective.apart().whole()
        # The caller's loss and gradient are those of the whole batch.
        whole_batch = ("value", "grad", "loss", "obj_fn")
        extra = {name: x for name, x in extra.items() if name not in whole_batch}
        averaged: frozenset[str] = frozenset()
        keys = StateKeys(inner.init, params)

        def one(
            i: jax.Array, batch: Tree, params: Tree, state: Any
        ) -> tuple[Any, jax.Array | None]:
            nonlocal averaged
            group = objective.piece(batch, i, count)
            group = group if count == 1 else group.piece_of(batch_of_all)
            (value, aux), gradient = group.value_aux_and_grad(params)
            given = Signal(gradient, gradient, value=value, aux=aux, local=local)
            start = keys.map(lambda key: jax.random.fold_in(key, first * count + i), state)
            out, new = inner.update(given, start, params, value_fn=group, **extra)
            averaged = out.averaged - out.local
            diagonal = None if local and weight is not None else out.diagonal
            # Keys and axis names do not average; both are put back below.
            out = out._replace(diagonal=diagonal, matvec=None, local=None, averaged=None)
            return (out, keys.without(new)), group.batch_weight()

        out, new = over_groups(one, groups, count, params, state)
        out = out._replace(aux=microbatching.finished(out.aux))
        out, new = _laid_out(out, params), meshes.laid_like(new, state)
        whole = averaged.union(axis for axis in within if isinstance(axis, str))
        out = out._replace(local=local - averaged, averaged=whole)
        if weight is not None:
            # What devices shared has been averaged over groups by each one's own weights.
            out = _mean(out, tuple(axis for axis in axes.manual() if axis in averaged), weight)
        advanced = keys.map(lambda key: jax.random.fold_in(key, shards * count), state)
        new = keys.put_back(advanced, new)
        return out, jax.tree.map(lambda x, old: _settled(x, old, objective, local), new, state)

    return stage(inner.init, rule, replaces_gradient=True)


def _laid_out(signal: Signal, params: Tree) -> Signal:
    """The signal with what is shaped like the parameters laid out like them (explicit meshes)."""
    lay = lambda tree: None if tree is None else meshes.laid_like(tree, params)
    return signal._replace(
        updates=lay(signal.updates), gradient=lay(signal.gradient), diagonal=lay(signal.diagonal)
    )


def _devices_of_a_group(m: int, objective: Objective) -> tuple[axes.Along, ...]:
    """Along what the devices lie that share a group larger than a device's part of the batch.

    Raises:
        ValueError: no axes, and no part of one, hold just the devices of a group.
    """
    size, split = objective.size, objective.batch_axes()
    along = tuple(axis for axis in axes.manual() if axis in split)
    if m <= size or not along:
        return ()
    devices = lax.axis_size(along)
    if m % size or devices * size % m:
        raise ValueError(
            f"`per_group({m}, ...)` cuts a batch of {devices * size} examples, {size} on each of "
            f"{devices} devices, into groups of {m}, which do not come out even. Take a divisor of "
            f"the batch that is a multiple of {size}, or divides it."
        )
    found = axes.last_of_size(m // size, along)
    if found is None:
        raise ValueError(
            f"`per_group({m}, ...)` has {size} examples on each device, and the last of the device "
            f"axes {along} of the batch do not hold the {m // size} neighbours of a group. Give "
            "the mesh of `shard_map` a last axis for them, as "
            f'`jax.make_mesh(({devices * size // m}, {m // size}), ("batch", "group"))`, or run '
            "under `jit`, where groups are cut from the whole batch."
        )
    return found


def _settled(x: jax.Array, old: jax.Array, objective: Any, local: frozenset[str]) -> jax.Array:
    """A moment, metric or key after the groups, the same on every device if it was so before.

    The mean, or the last group's of what has none. Where types do not tell, moments that all
    devices share already are averaged once more, and counts are taken to be shared.
    """
    own = axes.varying(x) - axes.varying(old) if axes.tracked() else local | set(objective.joined)
    over = tuple(axis for axis in axes.manual() if axis in own)
    if over and axes.tracked() and not is_float(x):
        return axes.last(x, over)
    return axes.mean(x, over, objective.batch_weight())
