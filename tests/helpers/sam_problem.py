"""The net's parameters and gradient as flat vectors, for formulas of SAM."""

from typing import Any

import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from small_problems import flat, net_batch, net_loss, net_params

import curvax as cx

PARAMS = net_params()
WEIGHTS, unravel = ravel_pytree(PARAMS)
IS_BIAS = flat(jax.tree.map_with_path(lambda path, x: 0 * x + ("bias" in str(path)), PARAMS)) == 1


def objective(**options: Any) -> cx.Objective:
    return cx.Objective(net_loss, net_batch(), **options)


def loss(weights: Any) -> jax.Array:
    """The loss of a flat vector of weights."""
    return net_loss(unravel(weights), net_batch())


GRADIENT = np.asarray(jax.grad(loss)(WEIGHTS))


def step(tx: Any, state: Any = None, params: Any = PARAMS, **extra: Any) -> tuple[Any, Any]:
    """(updates, state) after one step with the gradient and value of the objective."""
    value_fn = objective()
    _, grads = value_fn.value_and_grad(params)
    state = tx.init(params) if state is None else state
    return tx.update(grads, state, params, value_fn=value_fn, **extra)
