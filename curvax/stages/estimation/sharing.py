"""What the estimators share: the caller's gradient, parts of the batch, shards, and their error."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax import accumulation, axes, checks, trees
from curvax.figures import Figures, measured
from curvax.objective import Objective, require_batch
from curvax.signal import Signal
from curvax.trees import Tree

Sampler = Callable[[jax.Array, Tree], Tree]


class Curvature(NamedTuple):
    """One estimate and the clean pass that came with it."""

    diagonal: Tree
    variance: Tree
    loss: tuple[jax.Array, Any]
    gradient: Tree


def check_fraction(fraction: Any, name: str) -> None:
    """Refuses a fraction of the batch that is none, or no plain number."""
    checks.check_static(name, fraction=fraction)
    if not 0 < fraction <= 1:
        raise ValueError(f"`{name}` takes `fraction` in (0, 1], and got {fraction}.")


def part_of(objective: Objective, fraction: float, name: str) -> Objective:
    """The loss on the first `fraction` of the batch."""
    if fraction == 1:
        return objective
    return require_batch(objective, f"{name}(fraction=)").first(fraction)


def share_gradient(
    signal: Signal,
    objective: Objective,
    params: Tree,
    loss: tuple[jax.Array, Any],
    gradient: Tree,
    local: frozenset[str],
) -> Signal:
    """Passes on the estimator's own gradient where the updates are that very gradient.

    Same numbers; the caller's backward pass becomes dead code, which the compiler drops.
    """
    value, aux = loss
    if objective.gave(params, signal.updates) is None:
        return signal if signal.value is not None else signal._replace(value=value, aux=aux)
    return signal._replace(updates=gradient, gradient=gradient, value=value, aux=aux, local=local)


def over_shards(
    estimate: Callable[[Objective, jax.Array], Curvature],
    objective: Objective,
    key: jax.Array,
    shards: int,
    local: frozenset[str],
    name: str,
) -> tuple[Curvature, bool]:
    """The estimate with one probe a shard, and whether it was made on the whole batch at once."""
    if shards == 1:
        return estimate(objective, key), True
    device, devices = axes.index_and_size(tuple(a for a in axes.manual() if a in local))
    if shards % devices:
        raise ValueError(
            f"`{name}(shards={shards})` cuts the global batch into equal parts, and "
            f"{shards} is no multiple of the {devices} devices. Use a multiple."
        )
    here = shards // devices
    if here == 1:
        return estimate(objective, jax.random.fold_in(key, device)), True
    objective = require_batch(objective, f"{name}(shards=)")
    accumulation.check_divides(objective.size, here, f"`{name}(shards={shards})`")

    def piece(i: jax.Array, batch: Tree) -> tuple[Curvature, jax.Array | None]:
        part = objective.piece(batch, i, here)
        return estimate(part, jax.random.fold_in(key, device * here + i)), part.batch_weight()

    groups = objective.groups(objective.size // here)
    found = accumulation.mean_over_vmap(piece, groups, here)
    return found._replace(variance=trees.scale(1 / here, found.variance)), False


def relative_error(diagonal: Tree, variance: Tree) -> Figures:
    error = trees.ratio(jnp.sqrt(trees.total(variance)), trees.norm(diagonal))
    return measured({"diagonal_relative_error": error})
