"""The small net with labels of every likelihood."""

import jax
import jax.numpy as jnp
from small_problems import net, net_batch

import curvax as cx

CLASSES = 2


def batch_of(n=8):
    batch = net_batch(n)
    keys = jax.random.split(jax.random.key(5), 3)
    return batch | {
        "label": jax.random.randint(keys[0], (n,), 0, CLASSES),
        "bits": (batch["y"] > 0).astype(float),
        "counts": jax.random.poisson(keys[1], 2.0, (n, 2)).astype(float),
        "w": jax.random.uniform(keys[2], (n,), minval=0.1, maxval=3.0),
        "keep": jnp.arange(n) % 3 != 1,
    }


LIKELIHOODS = {
    "categorical": cx.categorical("label"),
    "bernoulli": cx.bernoulli("bits"),
    "gaussian": cx.gaussian("y"),
    "poisson": cx.poisson("counts"),
    "weighted": cx.categorical("label", weights="w"),
    "masked": cx.gaussian("y", mask="keep"),
}


def objective(name, n=8, **options):
    return cx.Objective(LIKELIHOODS[name], batch_of(n), model=net, **options)
