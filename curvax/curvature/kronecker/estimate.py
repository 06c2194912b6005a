"""A model and a point ↦ its Kronecker-factored Fisher matrix, with nothing registered."""

from collections.abc import Callable

import jax

from curvax import checks
from curvax.arithmetic.trees import Tree
from curvax.curvature.kronecker.cotangents import draws_of
from curvax.curvature.kronecker.factors import KroneckerFactors
from curvax.curvature.kronecker.options import Options, check_draws, required
from curvax.curvature.kronecker.sums import sums_of
from curvax.curvature.kronecker.tapped import tapped
from curvax.devices import axes
from curvax.devices.axes import AxisNames
from curvax.objective import Objective, microbatch_mean


def kronecker_factors(
    objective: Objective | Callable[[Tree], jax.Array],
    params: Tree,
    *,
    fisher: str = "exact",
    sharing: str = "expand",
    bias: str = "joint",
    labels: jax.Array | None = None,
    key: jax.Array | None = None,
    mean_over: AxisNames = None,
) -> KroneckerFactors:
    """The Kronecker-factored Fisher matrix of a model at `params`, F ≈ G ⊗ A for each kernel.

        A = E[a aᵀ],   G = E[g gᵀ],   F vec(V) ≈ vec(G V A)

    where a are the inputs of a kernel and g the derivatives of log r(y|z) in its outputs. Martens &
    Grosse, arXiv:1503.05671; Grosse & Martens, arXiv:1602.01407; Eschenhagen et al.,
    arXiv:2311.00636.

    The model is traced, and every parameter is followed to where it multiplies activations: by
    matrix products and `einsum`, convolutions, look-ups of embeddings, through `jit`, `remat`,
    `custom_jvp`, `vmap`, casts, transposes and reshapes. In a `scan` over layers each layer has
    factors of its own. A bias that is added to a product joins its kernel. Other parameters (norm
    scales, lone biases) get the diagonal of the Fisher matrix; `report()` says which and why.

    Args:
        objective: an `Objective` with `model=` and a likelihood as its loss.
        params: the point θ.
        fisher: `exact`, the expectation over labels, by one backward pass for each output of an
            example; `sampled`, by labels drawn from the model, one pass; `empirical`, with the
            labels of the batch, one pass, for any loss.
        sharing: what is done with the positions s = 1..S at which an example uses a kernel (tokens,
            windows, calls). `expand` takes them as independent, A = 1/NS Σ aaᵀ and G = 1/N Σ ggᵀ
            over n and s; `reduce` averages a and sums g over them first.
        bias: `joint` adds a last input that is 1 to A; `separate` gives the bias the block G.
        labels: draws for `sampled`, given explicitly, [S, ...] or [...], where [...] is the shape
            of hard targets.
        key: a typed key to draw labels with, one for each site.
        mean_over: device axis, or tuple of axes, to average over; `()` for the factors of each
            device.

    Returns:
        `KroneckerFactors`: `factors(v)` is the product, `factors.solve(v, damping)`,
        `factors.power(v, exponent, damping)`, `factors.trace()`, `factors.report()` and
        `factors.corrected(objective, params)`. A pytree.

    Raises:
        ValueError: an option is unknown, the loss is not a likelihood, `labels` and `key` do not
            go with `fisher`, or the loss is local to a device axis and `mean_over` is missing.
        TypeError: `key` is not a typed key, or a parameter is complex.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> batch = {"x": jnp.array([[1.0, 0.0], [0.0, 2.0]]), "y": jnp.zeros((2, 1))}
        >>> predict = lambda w, batch: batch["x"] @ w
        >>> objective = curvax.Objective(curvax.gaussian("y"), batch, model=predict)
        >>> w = jnp.ones((2, 1))
        >>> factors = curvax.kronecker_factors(objective, w)
        >>> factors(w)[:, 0].round(3).tolist()  # E[x xᵀ] w
        [0.5, 2.0]
        >>> factors.solve(factors(w), damping=0.0)[:, 0].round(3).tolist()
        [1.0, 1.0]
    """
    options = Options(fisher, sharing, bias).checked()
    check_draws(fisher, labels, key, "kronecker_factors")
    objective = required(objective, params, fisher, "kronecker_factors")
    local = objective.local_axes(params)
    over = checks.averaged_axes(mean_over, local, stage="kronecker_factors")
    draws = draws_of(objective, fisher, labels, key)

    own = lambda part, *draws: sums_of(tapped(part, params), options, *draws)
    with jax.default_matmul_precision("highest"):
        found = microbatch_mean(objective, own, *draws, aux=False)
        found = axes.mean(found, over, objective.batch_weight())
        return found.finished(local - set(over))
