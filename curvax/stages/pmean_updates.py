"""The mean of the updates over devices."""

from typing import Any

import optax

from curvax import checks
from curvax.arithmetic.trees import Tree
from curvax.devices.axes import AxisNames
from curvax.objective import as_objective
from curvax.pipes.signal import Signal, Stage, mean_over_devices, stage, weight_of


def pmean_updates(axis_name: AxisNames) -> Stage:
    """Averages updates, clean gradient and losses over device axes.

    Later stages see the means. Means that nothing uses are dropped by the compiler, and values that
    are equal on all devices cost nothing. Devices are weighted by the objective's weight where it
    has one. Where no axis is bound the stage is the identity, so that one pipe serves jit, pmap and
    shard_map.

    Args:
        axis_name: device axis, or tuple of axes; `()` declares that the updates stay local to each
            device.

    Returns:
        A stage.

    Raises:
        ValueError: in `update`, the axis is not bound while others are, or it is None and the
            updates are local.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, curvax
        >>> loss = lambda w: 0.5 * jnp.sum(w**2)
        >>> tx = curvax.sam_perturb(0.1) | curvax.pmean_updates("batch") | optax.sgd(1.0)
        >>> w = jnp.array([3.0, 4.0])
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> [round(float(x), 3) for x in updates]  # outside of pmap and shard_map: the identity
        [-3.06, -4.08]
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
        return mean_over_devices(signal, over, weight)._replace(local=remaining), state

    return stage(lambda params: optax.EmptyState(), rule, evaluates_loss=False, complex_leaves=True)
