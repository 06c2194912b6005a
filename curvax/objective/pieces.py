"""Objectives on parts of a batch, and the number of a part in the global batch.

The batch of an objective may be a piece of the one that was passed (a group, a micro-batch, an
example) and one device's part of the global batch. A group of `per_group` may span several devices;
its objective is that of the whole group.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import jax

from curvax.devices import axes
from curvax.objective.gradient_cache import GradientCache

if TYPE_CHECKING:
    from curvax.objective.objective import Objective


def changed(objective: Objective, **fields: Any) -> Objective:
    """A copy with other fields and an empty gradient cache."""
    other = copy.copy(objective)
    other.gradients, other.known_axes, other.whole = GradientCache(), {}, None
    vars(other).update(fields)
    return other


def as_group(objective: Objective, over: tuple[axes.Along, ...]) -> Objective:
    """The mean loss of a group of devices, those along the bound device axes `over`.

    Value, gradient, Hessian and weight are those of the group. Methods that read the batch
    (examples, outputs, micro-batches) raise an error, since a device holds only its part.
    """
    return changed(objective, grouped=True, joined=over)


def device_part(objective: Objective) -> Objective:
    """The loss on this device's part of the batch; the objective itself if it is not in a group."""
    return changed(objective, joined=()) if objective.joined else objective


def as_piece_of(objective: Objective, whole: tuple[Any, ...]) -> Objective:
    """The same loss, its aux prepared for a reduction over the pieces of `whole`.

    `microbatching.finished` turns the reduced aux into that of the whole batch.
    """
    return changed(objective, whole=whole) if objective.has_aux else objective


def whole_batch(objective: Objective) -> tuple[Any, ...]:
    """(batch, *keys) of the batch that this is a piece of, or of this batch."""
    return objective.whole or (objective.batch, *keys(objective))


def keys(objective: Objective) -> tuple[jax.Array, ...]:
    """(key of this piece,), or () without a key."""
    if objective.key is None:
        return ()
    number, count = piece_number(objective, batch_axes(objective))
    return (jax.random.fold_in(objective.key, number) if count > 1 else objective.key,)


def batch_axes(objective: Objective) -> frozenset[str]:
    """The device axes over which the batch is divided."""
    return axes.varying(objective.batch) if axes.tracked() else frozenset(axes.manual())


def piece_number(objective: Objective, local: frozenset[str]) -> tuple[Any, int]:
    """(i, n): the examples on this device are piece i of n of the global batch."""
    device, devices = axes.index_and_size(tuple(a for a in axes.manual() if a in local))
    i, n = objective.place
    return device * n + i, devices * n


def shard_number(objective: Objective, local: frozenset[str]) -> tuple[Any, int]:
    """(i, n): this loss, or that of its group, is on piece i of n of the global batch."""
    number, count = piece_number(objective, local)
    rows = (part for part in objective.joined if isinstance(part, axes.Neighbours))
    together = math.prod(row.size for row in rows if row.axis in local)
    return number // together, count // together
