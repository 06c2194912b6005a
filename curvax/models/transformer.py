"""The transformer block, attention and MLP, with or without a causal mask."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from curvax.models.blocks import Block
from curvax.models.layers import Mlp


def require_heads(heads: int, width: int) -> None:
    """Refuses a number of heads that does not divide the width.

    Raises:
        ValueError: `heads` does not divide `width`.
    """
    if width % heads:
        raise ValueError(
            f"`heads` divides `width`, and {heads} does not divide {width}. Change one of them."
        )


class TransformerBlock(Block, kw_only=True):
    """Attention, then an MLP, each normalised first, with a residual sum.

    Attributes:
        heads: attention heads; divides the width.
        mlp_width: hidden width of the MLP.
        causal: whether tokens attend only to themselves and earlier tokens.
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
