"""What the transformers share: a block of attention and MLP, with a mask or without."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from curvax.models.blocks import Block
from curvax.models.layers import Mlp


def require_heads(heads: int, width: int) -> None:
    """Refuses a number of heads that does not divide the width.

    Raises:
        ValueError: it does not.
    """
    if width % heads:
        raise ValueError(f"`heads` divides `width`, and {heads} does not divide {width}.")


class TransformerBlock(Block, kw_only=True):
    """Attention, then an MLP, each normalised before and added to its input.

    Attributes:
        causal: whether a token sees only itself and those before it.
    """

    heads: int
    mlp_width: int
    causal: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, fraction: jax.Array, train: bool) -> tuple[jax.Array, None]:
        h = nn.LayerNorm(dtype=self.dtype, name="norm1")(x)
        attention: Any = nn.MultiHeadDotProductAttention(
            self.heads,
            kernel_init=nn.initializers.xavier_uniform(),
            dtype=self.dtype,
            name="attention",
        )
        h = attention(h, mask=nn.make_causal_mask(jnp.ones(x.shape[:2])) if self.causal else None)
        h = nn.Dropout(self.dropout)(h, deterministic=not train)
        x = self.add(x, h, fraction, train)
        h = nn.LayerNorm(dtype=self.dtype, name="norm2")(x)
        h = Mlp(self.mlp_width, self.dropout, self.dtype, name="mlp")(h, train)
        return self.add(x, h, fraction, train), None
