"""A loss, a point and a scale ρ ↦ the mean rise of the loss under random perturbations."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from curvax import checks
from curvax.analysis.evaluation import Loss, as_loss, evaluate_mean
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Key, Scalar
from curvax.devices.axes import AxisNames
from curvax.linalg import gaussian_probe
from curvax.linalg.probes import as_key
from curvax.objective import Objective, device_mean


class RandomSharpness(NamedTuple):
    """Result of `random_sharpness`: the rise of the loss under random perturbations."""

    value: jax.Array
    """The mean of L(θ + ε) - L(θ) over draws, scalar; SAM's Theorem 2 assumes that it is >= 0."""
    standard_error: jax.Array
    """The standard error of that mean, scalar; NaN for a single draw."""
    share: jax.Array
    """The share of draws with L(θ + ε) >= L(θ), scalar."""
    differences: jax.Array
    """L(θ + ε) - L(θ) of each draw, [draws]."""


def random_sharpness(
    objective: Loss,
    params: Tree,
    rho: Scalar,
    *,
    draws: int = 16,
    normalised: bool = False,
    probes: Tree = None,
    key: Key = 0,
    chunk: int = 1,
    mean_over: AxisNames = None,
) -> RandomSharpness:
    """Estimates the mean rise of the loss under Gaussian perturbations.

        E L(θ + ρ z) - L(θ),   z ~ N(0, I)

    For small ρ it is ½ρ² tr ∇²L. The generalisation bound of SAM assumes that it is not negative
    on the distribution of the data, which held-out examples estimate. Foret et al., SAM,
    arXiv:2010.01412, Theorem 2. Half-precision parameters are widened to float32.

    Args:
        objective: an `Objective`, a `DatasetLoss`, or a callable `params -> scalar`.
        params: the point θ.
        rho: ρ >= 0: the standard deviation of each entry, or the length of ε if `normalised`.
        draws: number of perturbations, one forward pass each.
        normalised: use ε = ρ z/‖z‖₂, at the distance of `sharpness` with p = 2.
        probes: the z, trees like `params` stacked along a new first axis, instead of `draws` and
            `key`.
        key: typed key or seed.
        chunk: draws evaluated at once.
        mean_over: device axes over which L is the mean; `()` for the loss of each device.

    Returns:
        A `RandomSharpness`.

    Raises:
        ValueError, TypeError: an option out of range, or parameters that are not floating.

    Examples:
        >>> import jax.numpy as jnp
        >>> from curvax import analysis
        >>> loss = lambda w: 0.5 * jnp.sum(w**2)
        >>> found = analysis.random_sharpness(loss, jnp.zeros(3), 0.1, normalised=True)
        >>> round(float(found.value), 4), round(float(found.share), 1)  # ½ρ²; every draw rises
        (0.005, 1.0)
    """
    objective = as_loss(objective, "random_sharpness", params)
    trees.require_floating(params, "random_sharpness")
    checks.check_range("rho", rho, 0, jnp.inf, stage="random_sharpness")
    checks.check_count("random_sharpness", draws=draws, chunk=chunk)
    keys = jax.random.split(as_key(key), draws) if probes is None else None
    options = dict(normalised=normalised, chunk=chunk, mean_over=mean_over)
    differences = evaluate_mean(_differences, objective, params, rho, keys, probes, **options)
    n = len(differences)
    mean = jnp.mean(differences)
    error = jnp.std(differences, ddof=1) / n**0.5 if n > 1 else trees.nan_like(mean)
    share = jnp.mean(differences >= 0, dtype=differences.dtype)
    return RandomSharpness(mean, error, share, differences)


def _differences(
    objective: Objective,
    params: Tree,
    rho: Scalar,
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

    def perturbed(draw: Tree) -> jax.Array:
        z = gaussian_probe(draw, params) if probes is None else draw
        scale = trees.ratio(jnp.asarray(rho), trees.norm(z)) if normalised else rho
        return device_mean(objective, trees.add_scaled(params, scale, z), over)

    draws = keys if probes is None else probes
    count = len(jax.tree.leaves(draws)[0])
    losses = lax.map(perturbed, draws, batch_size=min(chunk, count))
    return losses - device_mean(objective, params, over)
