"""Groups of examples that take the stages separately: m-sharpness whatever the devices."""

from typing import Any

import jax
import optax
from jax import lax

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree, is_float
from curvax.arithmetic.typing import ValueFn
from curvax.devices import axes, meshes
from curvax.hyperparameters import injectable
from curvax.objective import (
    Objective,
    as_objective,
    microbatching,
    pieces,
    require_batch,
    value_aux_and_grad,
)
from curvax.pipes import order
from curvax.pipes.signal import Signal, Stage, mean_over_devices, pipe, stage
from curvax.pipes.state_keys import StateKeys


@injectable
def per_group(m: int, stages: optax.GradientTransformation, *, sequential: bool = False) -> Stage:
    """Applies stages to groups of m examples and averages the updates (m-sharpness).

        u = 1/G Σ_g stages(∇L_g(θ)),   L_g the loss of the g-th contiguous group

    `per_group(m, sam_perturb(rho) | gsam_project(alpha)) | optax.adamw(lr)` perturbs and projects
    per m examples, whatever the number of devices. Every group starts from the same state, with a
    key of its own; afterwards moments and metrics are averaged, and counts and keys advance once.
    The gradient given to `update` is not used, and is not computed. A curvature diagonal is passed
    on, except where devices are weighted. The aux is that of the whole batch. Foret et al., SAM,
    arXiv:2010.01412, section 4.1.

    On a mesh of explicit axes, groups that divide evenly among the devices stay on them: the cost
    is one all-reduce of the parameters' size, after one all-gather of parameters that are sharded
    along the axes of the batch (FSDP). Otherwise (fewer groups than devices, or a model that names
    the axis of the batch) every device works on a part of each group: the batch is moved once, and
    each group and pass costs one all-reduce.
    If neither groups nor examples divide evenly, devices repeat each other's work.

    Args:
        m: number of examples in a group; a positive int that divides the batch. Under device axes
            it divides the batch of each device; or a group spans neighbouring devices, all of them
            along the last axes that split the batch (`jax.make_mesh((4, 2), ("batch", "group"))`),
            or consecutive ones under `pmap`, and the ascent starts from the mean gradient of the
            group. With `check_vma=False` every axis of the mesh counts as splitting the batch.
        stages: a stage, a pipe, or a plain Optax transformation.
        sequential: whether groups run one after the other, in the memory of one, or all at once.

    Returns:
        A stage that needs `value_fn=` an `Objective` with a batch.

    Raises:
        ValueError, TypeError: m is not a positive int; in `update`, m does not divide the batch, or
            needs devices that no axes hold, or the stages look into a group that spans devices.

    Examples:
        >>> import jax.numpy as jnp, optax, curvax
        >>> loss = lambda w, batch: 0.5 * jnp.mean((batch - w) ** 2)
        >>> objective = curvax.Objective(loss, jnp.arange(8.0))
        >>> tx = curvax.per_group(2, curvax.sam_perturb(0.1)) | optax.sgd(1.0)
        >>> w = jnp.array(0.0)
        >>> _, grads = objective.value_and_grad(w)
        >>> updates, state = tx.update(grads, tx.init(w), w, value_fn=objective)
        >>> round(float(updates), 3)
        3.6
    """
    checks.check_count("per_group", m=m)
    inner = pipe(stages)
    over_groups = microbatching.mean_over_scan if sequential else microbatching.mean_over_vmap

    def rule(
        signal: Signal,
        state: optax.OptState,
        params: Tree,
        *,
        value_fn: ValueFn | None = None,
        **extra: Any,
    ) -> tuple[Signal, optax.OptState]:
        objective = require_batch(as_objective(value_fn, "per_group", params), "per_group")
        order.refuse_changed_in_pipe(signal.updates, signal.gradient, "per_group")
        objective, groups, count = _divided(m, objective)
        local, weight = objective.local_axes(params), objective.batch_weight()
        first, shards = pieces.shard_number(objective, local)
        whole_batch = pieces.whole_batch(objective)
        # The caller's loss is that of the whole batch; `value_fn` and `value` are each group's own.
        extra = {name: x for name, x in extra.items() if name not in ("loss", "obj_fn")}
        keys = StateKeys(inner.init, params)

        def one(
            i: jax.Array, batch: Tree, params: Tree, state: optax.OptState
        ) -> tuple[Tree, jax.Array | None]:
            group = objective.piece(batch, i, count)
            group = group if count == 1 else pieces.as_piece_of(group, whole_batch)
            (value, aux), gradient = value_aux_and_grad(group, params)
            given = Signal(gradient, gradient, value=value, aux=aux, local=local)
            start = keys.map(lambda key: jax.random.fold_in(key, first * count + i), state)
            own = {"value_fn": group, "value": value, "grad": gradient}
            out, new = inner.update(given, start, params, **extra | own)
            averaged = trees.Static(out.averaged - out.local)
            diagonal = None if local and weight is not None else out.diagonal
            # Keys and axis names do not average; both are put back below.
            out = out._replace(
                diagonal=diagonal, matvec=None, factors=None, local=None, averaged=None
            )
            return (out, averaged, keys.without(new)), group.batch_weight()

        out, shared, new = over_groups(one, groups, count, params, state)
        averaged = shared.value
        whole = averaged.union(axis for axis in objective.joined if isinstance(axis, str))
        out = _finished(out, params)._replace(local=local, averaged=frozenset())
        if weight is not None:
            # Values that devices share were averaged over groups by the weights of one device.
            over = tuple(axis for axis in axes.manual() if axis in averaged)
            out = mean_over_devices(out, over, weight)
        out = out._replace(local=local - averaged, averaged=whole)
        advanced = keys.map(lambda key: jax.random.fold_in(key, shards * count), state)
        new = keys.put_back(advanced, meshes.laid_like(new, state))
        return out, jax.tree.map(lambda x, old: _settled(x, old, objective, local), new, state)

    return stage(inner.init, rule, replaces_gradient=True)


def _divided(m: int, objective: Objective) -> tuple[Objective, Tree, int]:
    """(the loss of groups of m examples, the batch of this device in groups, their number)"""
    within = _devices_of_a_group(m, objective)
    here = objective.size if within else m
    groups = objective.groups(here, f"`per_group({m}, ...)`")
    return pieces.as_group(objective, within), groups, objective.size // here


def _finished(mean: Signal, params: Tree) -> Signal:
    """The mean signal of the groups with the whole batch's aux, its trees sharded like `params`."""
    lay = lambda tree: None if tree is None else meshes.laid_like(tree, params)
    return mean._replace(
        updates=lay(mean.updates),
        gradient=lay(mean.gradient),
        diagonal=lay(mean.diagonal),
        aux=microbatching.finished(mean.aux),
    )


def _devices_of_a_group(m: int, objective: Objective) -> tuple[axes.Along, ...]:
    """The axes of the devices that share a group larger than a device's part of the batch.

    Raises:
        ValueError: no axes, and no part of one, hold exactly the devices of a group.
    """
    size, split = objective.size, pieces.batch_axes(objective)
    along = tuple(axis for axis in axes.manual() if axis in split)
    if m <= size or not along:
        return ()
    devices = lax.axis_size(along)
    if m % size or devices * size % m:
        raise ValueError(
            f"`per_group({m}, ...)` divides a batch of {devices * size} examples, {size} on each "
            f"of {devices} devices, into groups of {m}, which do not fit the devices evenly. "
            f"Choose a divisor of the batch that is a multiple of {size}, or divides it."
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


def _settled(
    x: jax.Array, old: jax.Array, objective: Objective, local: frozenset[str]
) -> jax.Array:
    """A moment, metric or key after the groups, equal on all devices if it was so before.

    The mean, or the value of the last group for integers and keys. Where types do not show device
    axes, moments that all devices share are averaged once more, and counts are taken to be shared.
    """
    own = axes.varying(x) - axes.varying(old) if axes.tracked() else local | set(objective.joined)
    over = tuple(axis for axis in axes.manual() if axis in own)
    if over and axes.tracked() and not is_float(x):
        return axes.last(x, over)
    return axes.mean(x, over, objective.batch_weight())
