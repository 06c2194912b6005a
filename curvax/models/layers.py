"""Layers common to the models: MLP, stochastic depth, classification head, checks of options."""

from collections.abc import Collection
from difflib import get_close_matches
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


def require_choice(option: str, value: Any, choices: Collection[str]) -> None:
    """Refuses a value that is not among the choices.

    Raises:
        ValueError: another value; the error lists the choices and the nearest one.
    """
    if value not in choices:
        near = get_close_matches(str(value), choices, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"`{option}` is one of {tuple(choices)}, and got {value!r}.{hint}")


def require_rate(option: str, value: float) -> None:
    """Refuses a drop probability outside [0, 1).

    Raises:
        ValueError: a value outside.
    """
    if not 0.0 <= value < 1.0:
        raise ValueError(f"`{option}` is a probability in [0, 1), and got {value}.")


class Mlp(nn.Module):
    """Dense, GELU, dense, over the last axis, with dropout after each."""

    width: int
    dropout: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        options: dict[str, Any] = {
            "kernel_init": nn.initializers.xavier_uniform(),
            "bias_init": nn.initializers.normal(1e-6),
            "dtype": self.dtype,
        }
        h = nn.gelu(nn.Dense(self.width, **options)(x))
        h = nn.Dropout(self.dropout)(h, deterministic=not train)
        h = nn.Dense(x.shape[-1], **options)(h)
        return nn.Dropout(self.dropout)(h, deterministic=not train)


def drop_branch(key: jax.Array, branch: jax.Array, rate: jax.Array | float) -> jax.Array:
    """Stochastic depth: drops a residual branch for whole examples and rescales it for the others.

    Huang et al., arXiv:1603.09382.
    """
    shape = (branch.shape[0],) + (1,) * (branch.ndim - 1)
    keep = jax.random.bernoulli(key, 1 - rate, shape)
    return branch * (keep / (1 - rate)).astype(branch.dtype)


def classify(x: jax.Array, classes: int, *, bias: float, init: Any) -> jax.Array:
    """Logits in float32 or wider, (N, classes), of features (N, C); for 0 classes, the features."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if classes == 0:
        return x
    start = nn.initializers.constant(bias)
    return nn.Dense(classes, kernel_init=init, bias_init=start, name="head")(x)
