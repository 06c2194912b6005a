"""Vision transformers: an image as a sequence of patches.

Dosovitskiy et al., arXiv:2010.11929, with the classifier on the mean of the tokens or on a class
token, without a representation layer.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from curvax.models.layers import require_choice
from curvax.models.patchnets import PatchNet
from curvax.models.transformer import TransformerBlock, require_heads

POOLS = ("mean", "token")
POSITIONS = ("learned", "sincos")
WAVELENGTH = 10_000  # the longest; Vaswani et al., arXiv:1706.03762


class VisionTransformer(PatchNet, kw_only=True):
    """A vision transformer, called as `model(x, train=False)` on (N, H, W, C).

    Dropout follows the positions and every dense layer but the query, key and value projections;
    the paper uses 0.1 when training on ImageNet alone (Table 3).

    Attributes:
        heads: attention heads of each block; divides `width`.
        mlp_width: hidden width of the MLP of each block.
        pool: input of the classifier, the `mean` of the tokens or a class `token`.
        positions: `learned`, or fixed `sincos` in two dimensions.
    """

    heads: int
    mlp_width: int
    pool: str = "mean"
    positions: str = "learned"

    def __post_init__(self) -> None:
        require_choice("pool", self.pool, POOLS)
        require_choice("positions", self.positions, POSITIONS)
        require_heads(self.heads, self.width)
        if self.positions == "sincos" and (self.width % 4 or self.width < 8):
            raise ValueError(
                f"`positions='sincos'` needs a `width` of 4n >= 8, and got {self.width}. Change "
                "it, or use `positions='learned'`."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = self.embed(x)
        n, rows, columns, width = x.shape
        x = x.reshape(n, rows * columns, width) + self.position(rows, columns).astype(x.dtype)
        if self.pool == "token":
            token = self.param("cls", nn.initializers.zeros, (1, 1, width), jnp.float32)
            token = jnp.broadcast_to(token.astype(x.dtype), (n, 1, width))
            x = jnp.concatenate([token, x], axis=1)
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        x = self.blocks(TransformerBlock, x, train, heads=self.heads, mlp_width=self.mlp_width)
        return self.classify(x[:, 0] if self.pool == "token" else jnp.mean(x, axis=1))

    def position(self, rows: int, columns: int) -> jax.Array:
        """Position embeddings of the patches, (1, rows·columns, width)."""
        if self.positions == "sincos":
            return sincos(rows, columns, self.width)
        shape = (1, rows * columns, self.width)
        return self.param("pos_embedding", nn.initializers.normal(0.02), shape, jnp.float32)


def sincos(rows: int, columns: int, width: int) -> jax.Array:
    """Sines and cosines of both coordinates at geometric wavelengths, (1, rows·columns, width).

    Chen et al., MoCo v3, arXiv:2104.02057.
    """
    wavelength = WAVELENGTH ** jnp.linspace(0.0, 1.0, width // 4)[None]
    y, x = jnp.mgrid[:rows, :columns]
    angles = [place.reshape(-1, 1) / wavelength for place in (x, y)]
    waves = [wave(angle) for angle in angles for wave in (jnp.sin, jnp.cos)]
    return jnp.concatenate(waves, axis=1)[None]
