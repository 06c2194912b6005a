"""A product v ↦ C v ↦ estimates of its diagonal and trace, each with its standard error."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.safe_math import root
from curvax.arithmetic.trees import Tree
from curvax.devices import axes
from curvax.linalg.flatten import ravel, unravel

Product = Callable[[Tree], Tree]


class Estimate(NamedTuple):
    """A mean over probes and its standard error, NaN for a single probe."""

    mean: Tree
    standard_error: Tree


def estimate_diagonal(product: Product, probes: Tree) -> Estimate:
    """Hutchinson's estimate of the diagonal, mean of z ⊙ C z over probes.

    Args:
        product: v ↦ C v.
        probes: a tree whose leaves stack the probes along a new first axis, E[z zᵀ] = I.

    Returns:
        The estimate, shaped like one probe, and its standard error. Unbiased; exact with signs
        where C is diagonal. Yao et al., AdaHessian, arXiv:2006.00719, eq. 8.
    """
    return _over_probes(
        lambda z: jax.tree.map(lambda a, b: trees.widen(a) * trees.widen(b), z, product(z)), probes
    )


def estimate_trace(product: Product, probes: Tree) -> Estimate:
    """Hutchinson's estimate of the trace, mean of zᵀ C z over probes.

    Args:
        product: v ↦ C v.
        probes: a tree whose leaves stack the probes along a new first axis, E[z zᵀ] = I.

    Returns:
        The estimate, a scalar, and its standard error. Unbiased.
    """
    return _over_probes(lambda z: trees.dot(z, product(z)), probes)


def exact_diagonal(product: Product, like: Tree) -> Tree:
    """The diagonal of C, entry by entry: one product for each.

    Args:
        product: v ↦ C v.
        like: a tree of arrays that says what v looks like.

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

    # Welford's update: the sum of squared deviations without cancellation, in units of the first.
    one = trees.magnitude(first)
    shrink = trees.inverse(one)

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
    return Estimate(mean, jax.tree.map(lambda s: one * root(s / (n * (n - 1))), square))
