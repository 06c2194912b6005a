"""The likelihoods by other libraries: log r(y|z), hard targets, and expectations over labels."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy import stats
from jax.scipy.special import gammaln
from small_problems import EXAMPLES, net, net_batch

import curvax as cx
from curvax.likelihoods import bernoulli, categorical, gaussian, poisson

FAMILIES = {
    "categorical": categorical,
    "bernoulli": bernoulli,
    "gaussian": gaussian,
    "poisson": poisson,
}


def hard_targets(name: str, *shape: int) -> jax.Array:
    """Hard targets for outputs of a shape."""
    key = jax.random.key(5)
    return {
        "categorical": lambda: jax.random.randint(key, shape[:-1], 0, shape[-1]),
        "bernoulli": lambda: jax.random.bernoulli(key, 0.4, shape).astype(float),
        "gaussian": lambda: jax.random.normal(key, shape),
        "poisson": lambda: jax.random.poisson(key, 2.0, shape).astype(float),
    }[name]()


def log_likelihood(name: str, z: jax.Array, y: jax.Array) -> jax.Array:
    """log r(y|z) up to constants, one number for each example of the leading axis."""
    if name == "categorical":
        terms = -optax.softmax_cross_entropy_with_integer_labels(z, y)
    elif name == "bernoulli":
        terms = -optax.sigmoid_binary_cross_entropy(z, y)
    elif name == "gaussian":
        terms = stats.norm.logpdf(y, z) + jnp.log(2 * jnp.pi) / 2
    else:
        terms = stats.poisson.logpmf(y, jnp.exp(z)) + gammaln(y + 1)
    return jnp.sum(terms.reshape(len(z), -1), axis=1)


def every_label(name: str, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Labels [K, n, ...] and their probabilities [K, n] under outputs z, [n, C].

    All there are; of counts those below 40; and for the Gaussian the nodes of a quadrature that is
    exact for polynomials of degree nine.
    """
    n, classes = z.shape
    if name == "categorical":
        return jnp.tile(jnp.arange(classes)[:, None], (1, n)), jax.nn.softmax(z).T
    if name == "gaussian":
        nodes, weights = np.polynomial.hermite_e.hermegauss(5)
        weights = weights / weights.sum()
    else:
        nodes = weights = np.arange(2.0 if name == "bernoulli" else 40.0)
    grid = jnp.array(list(itertools.product(nodes, repeat=classes)))[:, None, :]
    if name == "gaussian":
        masses = jnp.array(list(itertools.product(weights, repeat=classes)))
        return z[None] + grid, jnp.tile(jnp.prod(masses, axis=1)[:, None], (1, n))
    labels = jnp.tile(grid, (1, n, 1))
    log_p = jax.vmap(lambda y: log_likelihood(name, z, y))(labels)
    constant = jnp.sum(gammaln(labels + 1), axis=2) if name == "poisson" else 0.0
    return labels, jnp.exp(log_p - constant)


def net_objective(name: str, **options: Any) -> cx.Objective:
    batch = dict(net_batch(), y=hard_targets(name, EXAMPLES, 2))
    return cx.Objective(FAMILIES[name]("y"), batch, model=net, **options)
