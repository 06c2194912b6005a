"""A loss, a point and one or two directions ↦ the loss on a grid of the line or plane they span."""

import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from curvax import checks
from curvax.analysis.directions import stack_of
from curvax.analysis.evaluation.whole_sets import Loss, as_loss, averaged
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.devices.axes import AxisNames
from curvax.linalg import bases
from curvax.objective import Objective


class Landscape(NamedTuple):
    """The loss on a grid around a point."""

    losses: jax.Array
    """L(θ + Σᵢ αᵢ dᵢ), [points] or [points of the first direction, points of the second]."""
    coordinates: tuple[jax.Array, ...]
    """α along each direction, in units of that direction, [points] each."""


def landscape(
    objective: Loss,
    params: Tree,
    directions: Any,
    *,
    span: Any = 1.0,
    points: int | Sequence[int] = 21,
    chunk: int = 1,
    mean_over: AxisNames = None,
) -> Landscape:
    """The loss along a line or in a plane through a point.

        L(θ + α d₁ + β d₂)

    One forward pass for each point of the grid. Parameters in half precision are widened to
    float32. Li et al., arXiv:1712.09913.

    Args:
        objective: an `Objective` (with `microbatch=` in the memory of so many examples), a `Sweep`
            over a loader (one pass for the whole grid), or a callable `params -> scalar`.
        params: the point θ.
        directions: one or two of them, each a tree like the parameters, in a list, or stacked
            along a new first axis: `random_directions`, `top_eigenpairs(...).vectors`,
            `trajectory_directions(...).directions`, a gradient; scaled by `filter_normalised`
            where networks are to be compared, times a mask of `block_masks` for one block alone.
        span: a number s for [-s, s], a pair (low, high), or a sequence of two such; in units of
            the directions.
        points: of the grid, along every direction or along each; an odd number has θ in it.
        chunk: points evaluated at once.
        mean_over: the device axes over which L is the mean; `()` for each device's own.

    Returns:
        A `Landscape`.

    Raises:
        ValueError: more than two directions, or not shaped like the parameters; a span without
            extent.
    """
    objective = as_loss(objective, "landscape", params)
    stack, k = stack_of(directions, params, "landscape")
    if not 1 <= k <= 2:
        raise ValueError(
            f"`landscape` is a slice along one or two directions, and got {k}. Take the first of "
            "them: `jax.tree.map(lambda d: d[:2], directions)`."
        )
    counts = [points] * k if isinstance(points, int) else list(points)
    ranges = _ranges(span, k)
    if len(counts) != k or len(ranges) != k:
        raise ValueError(
            "`landscape` takes `points` and `span` for all directions or for each of them, and "
            f"was given {points} and {span} for {k}."
        )
    for count in counts:
        checks.check_count("landscape", points=count, chunk=chunk)
    coordinates = tuple(jnp.linspace(*ends, n) for ends, n in zip(ranges, counts))
    options = dict(chunk=chunk, mean_over=mean_over)
    losses = averaged(_on_grid, objective, params, stack, coordinates, **options)
    return Landscape(losses, coordinates)


def _on_grid(
    objective: Objective,
    params: Tree,
    stack: Tree,
    coordinates: tuple[jax.Array, ...],
    *,
    chunk: int,
    mean_over: AxisNames,
) -> jax.Array:
    params = trees.wide(params)
    over = checks.averaged_axes(mean_over, objective.local_axes(params), stage="landscape")
    grid = jnp.stack(jnp.meshgrid(*coordinates, indexing="ij"), axis=-1)
    places = grid.reshape(-1, len(coordinates))

    def loss(place: jax.Array) -> jax.Array:
        return objective._device_mean(trees.add(params, bases.combination(place, stack)), over)

    losses = lax.map(loss, places, batch_size=min(chunk, len(places)))
    return losses.reshape(grid.shape[:-1])


def _ranges(span: Any, k: int) -> list[tuple[float, float]]:
    """(low, high) for each of k directions."""
    if isinstance(span, numbers.Real) or _is_pair(span):
        span = [span] * k
    ranges = [(-s, s) if isinstance(s, numbers.Real) else tuple(s) for s in span]
    for low, high in ranges:
        if not low < high:
            raise ValueError(
                "`landscape` takes `span` as a number s > 0 for [-s, s], or as a pair (low, high) "
                f"with low < high, and got {span!r}."
            )
    return ranges


def _is_pair(span: Any) -> bool:
    return len(span) == 2 and all(isinstance(end, numbers.Real) for end in span)
