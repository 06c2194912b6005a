"""A language model: a decoder-only transformer over characters, bytes or other tokens.

The decoder of Vaswani et al., arXiv:1706.03762, with norms before the branches as in GPT-2 (Radford
et al., 2019), learned positions and a head of its own.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from curvax.models.blocks import BlockNet
from curvax.models.transformer import TransformerBlock, require_heads

TOKENS, POSITIONS = nn.initializers.normal(1.0), nn.initializers.normal(0.02)
"""Unit variance, like the output of the first branches. GPT-2's 0.02 goes with smaller weights in
the branches, and would be lost in the sum here."""


class LanguageModel(BlockNet, kw_only=True):
    """Logits of the next token, called as `model(tokens, train=False)` on integers (N, T).

    Dropout follows the embedding and every dense layer but the query, key and value projections.

    Attributes:
        classes: size of the vocabulary, of the logits and of the embedding.
        heads: attention heads of each block; divides `width`.
        mlp_width: hidden width of the MLP of each block.
    """

    heads: int
    mlp_width: int

    def __post_init__(self) -> None:
        require_heads(self.heads, self.width)
        super().__post_init__()

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        embedding = nn.Embed(
            self.classes, self.width, embedding_init=TOKENS, dtype=self.dtype, name="embedding"
        )
        x = embedding(tokens)
        shape = (1, tokens.shape[1], self.width)
        x = x + self.param("pos_embedding", POSITIONS, shape, jnp.float32).astype(x.dtype)
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        options = {"heads": self.heads, "mlp_width": self.mlp_width, "causal": True}
        return self.classify(self.blocks(TransformerBlock, x, train, **options))
