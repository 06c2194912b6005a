"""A loss, a point and one or two directions ↦ the loss on a grid in the line or plane they span."""

import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from curvax import checks
from curvax.analysis.directions import stack_of
from curvax.analysis.evaluation import Loss, as_loss, evaluate_mean
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.devices.axes import AxisNames
from curvax.linalg import bases
from curvax.objective import Objective, device_mean

Span = float | tuple[float, float]
"""s for [-s, s], or (low, high)."""


class Landscape(NamedTuple):
    """Result of `landscape`: the loss on a grid around a point."""

    losses: jax.Array
    """L(θ + Σᵢ αᵢ dᵢ), [points] along d₁, or [points along d₁, points along d₂]."""
    coordinates: tuple[jax.Array, ...]
    """α along each direction, in units of its length, [points] each."""


def landscape(
    objective: Loss,
    params: Tree,
    directions: Tree,
    *,
    span: Span | Sequence[Span] = 1.0,
    points: int | Sequence[int] = 21,
    chunk: int = 1,
    mean_over: AxisNames = None,
) -> Landscape:
    """Evaluates the loss on a grid along a line or in a plane through a point.

        L(θ + α d₁ + β d₂)

    Li et al., arXiv:1712.09913. Cost: one forward pass for each point of the grid. Half-precision
    parameters are widened to float32.

    Args:
        objective: an `Objective` (with `microbatch=` in the memory of that many examples), a
            `DatasetLoss` (one pass over the data for the whole grid), or a callable
            `params -> scalar`.
        params: the point θ.
        directions: one or two trees like the parameters, in a list or stacked along a new first
            axis: from `random_directions`, `top_eigenpairs(...).vectors` or
            `trajectory_directions(...).directions`, or a gradient. Apply `filter_normalised` to
            compare networks, and a mask from `block_masks` for a single block.
        span: a number s for [-s, s], a pair (low, high), or one of these for each direction; in
            units of the directions.
        points: number of grid points along each direction, or a number for each; an odd number
            includes θ.
        chunk: points evaluated at once.
        mean_over: device axes over which L is the mean; `()` for the loss of each device.

    Returns:
        A `Landscape`.

    Raises:
        ValueError: more than two directions, directions not shaped like the parameters, or an
            empty span.

    Examples:
        >>> import jax.numpy as jnp
        >>> from curvax import analysis
        >>> loss = lambda w: 0.5 * jnp.sum(w**2)
        >>> found = analysis.landscape(loss, jnp.zeros(2), jnp.array([1.0, 0.0]), points=3)
        >>> [round(float(x), 3) for x in found.losses]
        [0.5, 0.0, 0.5]
    """
    objective = as_loss(objective, "landscape", params)
    stack, k = stack_of(directions, params, "landscape")
    if not 1 <= k <= 2:
        raise ValueError(
            f"`landscape` takes one or two directions, and got {k}. Select two of them: "
            "`jax.tree.map(lambda d: d[:2], directions)`."
        )
    counts = [points] * k if isinstance(points, int) else list(points)
    ranges = _ranges(span, k)
    if len(counts) != k or len(ranges) != k:
        raise ValueError(
            "`landscape` takes `points` and `span` for all directions or for each of them, and "
            f"got {points} and {span} for {k} directions. Pass {k} values, or one for all."
        )
    for count in counts:
        checks.check_count("landscape", points=count, chunk=chunk)
    coordinates = tuple(jnp.linspace(*ends, n) for ends, n in zip(ranges, counts))
    options = dict(chunk=chunk, mean_over=mean_over)
    losses = evaluate_mean(_on_grid, objective, params, stack, coordinates, **options)
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
        return device_mean(objective, trees.add(params, bases.combination(place, stack)), over)

    losses = lax.map(loss, places, batch_size=min(chunk, len(places)))
    return losses.reshape(grid.shape[:-1])


def _ranges(span: Span | Sequence[Span], k: int) -> list[tuple[float, float]]:
    """(low, high) for each of the k directions."""
    one = isinstance(span, numbers.Real) or _is_pair(span)
    spans: Any = [span] * k if one else span
    ranges = [(-s, s) if isinstance(s, numbers.Real) else tuple(s) for s in spans]
    for low, high in ranges:
        if not low < high:
            raise ValueError(
                "`landscape` takes `span` as a number s > 0 for [-s, s], or as a pair (low, high) "
                f"with low < high, and got {span!r}."
            )
    return ranges


def _is_pair(span: Any) -> bool:
    return len(span) == 2 and all(isinstance(end, numbers.Real) for end in span)
