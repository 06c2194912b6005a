"""The loss of a small model of Flax's nnx, and of one of Equinox."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx
from small_problems import net_batch

import curvax as cx


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        options: Any = dict(rngs=rngs, param_dtype=jnp.float64)
        self.first = nnx.Linear(4, 3, **options)
        self.norm = nnx.BatchNorm(3, use_running_average=True, **options)
        self.last = nnx.Linear(3, 2, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        with jax.numpy_rank_promotion("allow"):
            return self.last(nnx.gelu(self.norm(self.first(x))))


def nnx_problem() -> tuple[Any, Any]:
    def square(model: Any, batch: Any) -> jax.Array:
        return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)

    from curvax.flax_bridge import nnx_loss

    loss, params = nnx_loss(Nnx(nnx.Rngs(0)), square)
    return cx.Objective(loss, net_batch(), has_aux=True), params


def equinox_problem() -> tuple[Any, Any]:
    model = eqx.nn.MLP(4, 2, 3, 1, dtype=jnp.float64, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)

    def loss(params: Any, batch: Any) -> jax.Array:
        out = jax.vmap(eqx.combine(params, static))(batch["x"])
        return jnp.mean((out - batch["y"]) ** 2)

    return cx.Objective(loss, net_batch()), params
