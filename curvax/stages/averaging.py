"""Averages: over devices, and over groups of examples that each take the stages on their own."""

from typing import Any

import jax
import optax

from curvax import accumulation, axes, checks
from curvax.axes import AxisNames
from curvax.objective import as_objective, require_batch
from curvax.signal import Signal, Stage, pipe, stage
from curvax.trees import Tree


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
        objective = None if value_fn is None else as_objective(value_fn, "pmean_updates")
        local = signal.local
        if axis_name is None and objective is not None:
            local = local | objective.local_axes(params)
        over = checks.averaged_axes(axis_name, local, stage="pmean_updates")
        weight = None if objective is None else objective.batch_weight()
        mean = lambda tree: axes.mean(tree, over, weight)
        same = signal.gradient is signal.updates
        updates = mean(signal.updates)
        gradient = updates if same else mean(signal.gradient)
        value, perturbed_value = mean((signal.value, signal.perturbed_value))
        remaining = signal.local - set(over) if over else frozenset()
        signal = signal._replace(
            updates=updates, gradient=gradient, value=value, perturbed_value=perturbed_value,
            local=remaining,
        )  # fmt: skip
        return signal, state

    return stage(lambda params: optax.EmptyState(), rule)


def per_group(m: int, stages: optax.GradientTransformation, *, sequential: bool = False) -> Stage:
    """m-sharpness: groups of m examples each take the stages on their own, then the mean.

        u = 1/G Σ_g stages(∇L_g(θ)),   L_g the loss of the g-th contiguous group

    `per_group(m, sam_perturb(rho) | gsam_project(alpha)) | optax.adamw(lr)` perturbs and projects
    for every m examples, whatever the number of devices. Each group starts from the one state kept,
    with keys of its own; afterwards moments and figures are averaged, and counts and keys advance
    once. The gradient that the caller computed is not used, and compiles to nothing. Foret et al.,
    SAM, arXiv:2010.01412, section 4.1.

    Args:
        m: examples in a group; divides the batch (of each device, under an axis).
        stages: a stage, a pipe, or a plain transformation.
        sequential: one group at a time, in the memory of one, instead of all at once.

    Returns:
        A stage that needs an `Objective` with a batch.

    Raises:
        ValueError, TypeError: m < 1, or traced; at update, one that does not divide the batch.
    """
    checks.check_static("per_group", m=m)
    checks.check_range("m", m, 1, float("inf"), stage="per_group")
    inner = pipe(stages)
    over_groups = accumulation.mean_over_scan if sequential else accumulation.mean_over_vmap

    def rule(
        signal: Signal, state: Any, params: Tree, *, value_fn: Any = None, **extra: Any
    ) -> tuple[Signal, Any]:
        objective = require_batch(as_objective(value_fn, "per_group"), "per_group")
        local = objective.local_axes(params)
        groups = objective.groups(m)
        count = objective.size // m
        first, shards = objective.shard_number(local)

        def one(i: jax.Array, batch: Tree) -> tuple[Any, jax.Array | None]:
            group = objective.on(batch, part=(i, count))
            group.microbatch = None
            (value, aux), gradient = group.value_aux_and_grad(params)
            given = Signal(gradient, gradient, value=value, aux=aux, local=local)
            fold = lambda x: jax.random.fold_in(x, first * count + i) if _is_key(x) else x
            rest = {name: x for name, x in extra.items() if name not in ("value", "grad")}
            out, new = inner.update(
                given, jax.tree.map(fold, state), params, value_fn=group, **rest
            )
            return (out._replace(matvec=None, local=None), _without_keys(new)), group.batch_weight()

        out, new = over_groups(one, groups, count)
        advance = lambda old, x: jax.random.fold_in(old, shards * count) if _is_key(old) else x
        return out._replace(local=local), jax.tree.map(advance, state, new)

    return stage(inner.init, rule)


def _is_key(x: Any) -> bool:
    return jax.dtypes.issubdtype(jax.numpy.result_type(x), jax.dtypes.prng_key)


def _without_keys(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.numpy.zeros((), bool) if _is_key(x) else x, state)
