"""The device axes over which a loss differs from device to device, and along which devices see
each other's examples, found by tracing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax

from curvax.arithmetic.trees import Tree
from curvax.devices import axes
from curvax.objective import reductions
from curvax.objective.evaluation import microbatch_mean, value_and_aux
from curvax.objective.pieces import device_part

if TYPE_CHECKING:
    from curvax.objective.objective import Objective


def traced_axes(objective: Objective, params: Tree) -> frozenset[str]:
    """The bound device axes over which the loss of a device's part of the batch differs.

    Raises:
        ValueError: as in `Objective.local_axes`.
    """
    own = device_part(objective)
    loss = _loss_of(own)
    traced = jax.make_jaxpr(loss)(params)
    typed = axes.tracked()
    suspects = axes.varying(own.batch) if typed and own.batch is not None else axes.manual()
    reductions.refuse_reduced_output(traced, tuple(suspects))
    local = axes.varying_of(traced.out_avals[0]) if typed else frozenset(axes.manual())
    weight = own.batch_weight()
    if weight is not None:
        here = axes.vary(params, local)
        reductions.refuse_shared_activations(loss, here, _axes_of_weights(objective, weight))
    return local


def refuse_exchange(objective: Objective, params: Tree, over: tuple[str, ...], name: str) -> None:
    """Raises if the loss of a device depends on the parameters of other devices along these axes.

    Raises:
        ValueError: its backward pass communicates along one of them.
    """
    loss = _loss_of(device_part(objective))
    for found in reductions.exchanged(loss, axes.vary(params, objective.local_axes(params))):
        if axis := sorted(found & set(over)):
            raise ValueError(
                f"`{name}(shards=)` draws for each device along {axis[0]!r}, and the loss "
                "exchanges activations along it, as a contrastive loss and synchronised batch "
                "norm do: a device's product contains what other devices drew. Leave `shards` "
                "out, so that all devices draw the same."
            )


def _loss_of(own: Objective) -> Callable[[Tree], jax.Array]:
    return lambda p: microbatch_mean(own, lambda part: value_and_aux(part, p)[0], aux=False)


def _axes_of_weights(objective: Objective, weight: jax.Array) -> list[set[str]]:
    """Sets of device axes over which weights differ, as far as is known."""
    if axes.tracked():
        return [{axis} for axis in axes.varying(weight)]
    # Without types, weights are taken to differ over all axes together but not over each of
    # several: one of them may only split the model.
    return [set(axes.manual()), *({axis} for axis in objective.joined if isinstance(axis, str))]
