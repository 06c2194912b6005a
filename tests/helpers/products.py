"""Every curvature product, on the small net with weights."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from families import hard_targets
from small_problems import EXAMPLES, net_batch, net_params, quick_jit

import curvax as cx
from curvax.curvature import empirical_fvp, fvp, ggnvp, hvp
from curvax.likelihoods import categorical

KEY = jax.random.key(7)
LOSS = categorical("y", weights="w")
PRODUCTS: dict[str, Any] = {
    "hvp": hvp,
    "ggnvp": ggnvp,
    "fvp": fvp,
    "drawn": partial(fvp, samples=3, key=KEY),
    "empirical": empirical_fvp,
}
every_product = pytest.mark.parametrize("name", PRODUCTS)


def batch_of(n: int = EXAMPLES, dtype: Any = jnp.float64) -> dict[str, Any]:
    w = jnp.linspace(0.5, 2.0, n).at[1].set(0.0)
    return dict(net_batch(n, dtype), y=hard_targets("categorical", n, 2), w=w.astype(dtype))


def direction(params: Any) -> Any:
    return jax.tree.map(lambda x: jnp.cos(7 * x), params)


def applied(name: str, objective: cx.Objective, params: Any = None) -> Any:
    params = net_params() if params is None else params
    return quick_jit(lambda p: PRODUCTS[name](objective, p)(direction(p)))(params)
