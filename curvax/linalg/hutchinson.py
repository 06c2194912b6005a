"""The diagonal and the trace of a product v ↦ C v, estimated from random probes, or exact."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.safe_math import root
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Matvec
from curvax.devices import axes
from curvax.linalg.flatten import ravel, unravel


class Estimate(NamedTuple):
    """A mean over probes, with its standard error."""

    mean: Tree
    standard_error: Tree
    """Shaped like `mean`; NaN for a single probe."""


def estimate_diagonal(product: Matvec, probes: Tree) -> Estimate:
    """Hutchinson's unbiased estimate of the diagonal of a linear map.

        diag(C) = E[z ⊙ C z]

    Exact for a diagonal C with Rademacher probes. Yao et al., AdaHessian, arXiv:2006.00719, eq. 8.

    Args:
        product: v ↦ C v.
        probes: random vectors with E[z zᵀ] = I, stacked along a new first axis of every leaf.

    Returns:
        An `Estimate` whose `mean` and `standard_error` are shaped like one probe.

    Raises:
        TypeError: the probes or the products are complex.

    Examples:
        >>> import jax, jax.numpy as jnp, curvax
        >>> keys = jax.random.split(jax.random.key(0), 4)
        >>> probes = jax.vmap(lambda key: curvax.rademacher(key, jnp.zeros(3)))(keys)
        >>> product = lambda v: jnp.array([1.0, 2.0, 3.0]) * v
        >>> curvax.estimate_diagonal(product, probes).mean.tolist()
        [1.0, 2.0, 3.0]
    """
    return _over_probes(
        lambda z: jax.tree.map(lambda a, b: trees.widen(a) * trees.widen(b), z, product(z)), probes
    )


def estimate_trace(product: Matvec, probes: Tree) -> Estimate:
    """Hutchinson's unbiased estimate of the trace of a linear map.

        trace(C) = E[zᵀ C z]

    Hutchinson, Commun. Stat. Simul. Comput. 18, 1989.

    Args:
        product: v ↦ C v.
        probes: random vectors with E[z zᵀ] = I, stacked along a new first axis of every leaf.

    Returns:
        An `Estimate` whose `mean` and `standard_error` are scalars.

    Raises:
        TypeError: the probes or the products are complex.

    Examples:
        >>> import jax, jax.numpy as jnp, curvax
        >>> keys = jax.random.split(jax.random.key(0), 8)
        >>> probes = jax.vmap(lambda key: curvax.rademacher(key, jnp.zeros(3)))(keys)
        >>> estimate = curvax.estimate_trace(lambda v: 2 * v, probes)
        >>> float(estimate.mean), float(estimate.standard_error)
        (6.0, 0.0)
    """
    return _over_probes(lambda z: trees.dot(z, product(z)), probes)


def exact_diagonal(product: Matvec, like: Tree) -> Tree:
    """The exact diagonal of a linear map, with one product for each of its entries.

    Args:
        product: v ↦ C v.
        like: a tree of arrays with the structure, shapes and dtypes of v.

    Returns:
        A tree like `like`, in float32 or wider.

    Raises:
        TypeError: `like` is complex.
    """
    checks.refuse_complex(like, "exact_diagonal")
    size = sum(x.size for x in jax.tree.leaves(like))
    if not size:
        return like

    def entry(i: jax.Array) -> jax.Array:
        e = jnp.zeros(size).at[i].set(1)
        return ravel(product(unravel(e, like)))[i]

    wide = trees.wide(like)
    return unravel(lax.map(entry, jnp.arange(size)), wide)


def _over_probes(sample: Callable[[Tree], Tree], probes: Tree) -> Estimate:
    checks.refuse_complex(probes, "An estimate from probes")
    n = jax.tree.leaves(probes)[0].shape[0]
    first = sample(jax.tree.map(lambda z: z[0], probes))
    checks.refuse_complex(first, "An estimate from probes")
    if n == 1:
        return Estimate(first, jax.tree.map(trees.nan_like, first))

    # Welford's update of the sum of squared deviations, free of cancellation; deviations are
    # divided by a power of two near the first sample, so that their squares stay in range.
    unit = trees.magnitude(first)
    shrink = trees.inverse(unit)

    def body(carry, item):
        mean, square = carry
        i, z = item
        x = sample(z)
        ahead = jax.tree.map(lambda m, y: m + (y - m) / (i + 1).astype(m.dtype), mean, x)
        square = jax.tree.map(
            lambda s, m, a, y: s + (y - m) * shrink * ((y - a) * shrink), square, mean, ahead, x
        )
        return (ahead, square), None

    start = axes.carried(
        (first, jax.tree.map(jnp.zeros_like, first)),
        lambda carry: body(carry, (jnp.int32(0), jax.tree.map(lambda z: z[0], probes)))[0],
    )
    rest = jax.tree.map(lambda z: z[1:], probes)
    (mean, square), _ = lax.scan(body, start, (jnp.arange(1, n), rest))
    return Estimate(mean, jax.tree.map(lambda s: unit * root(s / (n * (n - 1))), square))
