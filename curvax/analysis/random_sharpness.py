"""A loss, a point and a scale ↦ how far the loss rises nearby on average."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from curvax import checks
from curvax.analysis.evaluation.whole_sets import Loss, as_loss, averaged
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.devices.axes import AxisNames
from curvax.linalg import gaussian_probe
from curvax.linalg.probes import as_key
from curvax.objective import Objective


class RandomSharpness(NamedTuple):
    """How far the loss rises on average over random perturbations."""

    value: jax.Array
    """The mean of L(θ + ε) - L(θ), scalar; SAM's Theorem 2 asks that it be no less than 0."""
    standard_error: jax.Array
    """Of that mean over draws, scalar; NaN for a single one."""
    share: jax.Array
    """The share of draws with L(θ + ε) >= L(θ), scalar."""
    differences: jax.Array
    """L(θ + ε) - L(θ) of each draw, [draws]."""


def random_sharpness(
    objective: Loss,
    params: Tree,
    rho: Any,
    *,
    draws: int = 16,
    normalised: bool = False,
    probes: Tree = None,
    key: jax.Array | int = 0,
    chunk: int = 1,
    mean_over: AxisNames = None,
) -> RandomSharpness:
    """How far the loss rises on average over Gaussian perturbations.

        E L(θ + ρ z) - L(θ),   z ~ N(0, I)

    SAM's generalisation bound holds where this is not negative over the distribution of the data
    (so pass held-out examples). For small ρ it is ½ρ² tr ∇²L. Parameters in half precision are
    widened to float32. Foret et al., SAM, arXiv:2010.01412, Theorem 2.

    Args:
        objective: an `Objective`, a `Sweep` over a loader, or a callable `params -> scalar`.
        params: the point θ.
        rho: ρ >= 0: the standard deviation of each entry, or the length of ε if `normalised`.
        draws: perturbations; a forward pass for each.
        normalised: ε = ρ z/‖z‖₂, as far out as `sharpness` goes in the 2-norm.
        probes: the z themselves, stacked along a new first axis, instead of `draws` and `key`.
        key: a typed key or a seed.
        chunk: draws evaluated at once.
        mean_over: the device axes over which L is the mean; `()` for each device's own.

    Returns:
        A `RandomSharpness`.

    Raises:
        ValueError, TypeError: an option out of range.
    """
    objective = as_loss(objective, "random_sharpness", params)
    trees.require_floating(params, "random_sharpness")
    checks.check_range("rho", rho, 0, jnp.inf, stage="random_sharpness")
    checks.check_count("random_sharpness", draws=draws, chunk=chunk)
    keys = jax.random.split(as_key(key), draws) if probes is None else None
    options = dict(normalised=normalised, chunk=chunk, mean_over=mean_over)
    differences = averaged(_differences, objective, params, rho, keys, probes, **options)
    n = len(differences)
    mean = jnp.mean(differences)
    error = jnp.std(differences, ddof=1) / n**0.5 if n > 1 else trees.nan_like(mean)
    share = jnp.mean(differences >= 0, dtype=differences.dtype)
    return RandomSharpness(mean, error, share, differences)


def _differences(
    objective: Objective,
    params: Tree,
    rho: Any,
    keys: jax.Array | None,
    probes: Tree,
    *,
    normalised: bool,
    chunk: int,
    mean_over: AxisNames,
) -> jax.Array:
    """L(θ + ε) - L(θ) of each draw, [draws]."""
    params = trees.wide(params)
    local = objective.local_axes(params)
    over = checks.averaged_axes(mean_over, local, stage="random_sharpness")

    def perturbed(draw: Any) -> jax.Array:
        z = gaussian_probe(draw, params) if probes is None else draw
        scale = trees.ratio(jnp.asarray(rho), trees.norm(z)) if normalised else rho
        return objective._device_mean(trees.add_scaled(params, scale, z), over)

    draws = keys if probes is None else probes
    count = len(jax.tree.leaves(draws)[0])
    losses = lax.map(perturbed, draws, batch_size=min(chunk, count))
    return losses - objective._device_mean(params, over)
