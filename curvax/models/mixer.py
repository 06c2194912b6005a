"""MLP-Mixer: MLPs across the patches of an image, alternating with MLPs across the channels.

Tolstikhin et al., arXiv:2105.01601.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from curvax.models.blocks import Block
from curvax.models.layers import Mlp
from curvax.models.patchnets import PatchNet


class MixerBlock(Block, kw_only=True):
    """An MLP over tokens, then one over channels, each normalised first, with a residual sum."""

    token_width: int
    channel_width: int

    @nn.compact
    def __call__(self, x: jax.Array, fraction: jax.Array, train: bool) -> tuple[jax.Array, None]:
        h = nn.LayerNorm(dtype=self.dtype, name="norm1")(x).swapaxes(1, 2)
        h = Mlp(self.token_width, self.dropout, self.dtype, name="token_mlp")(h, train)
        x = self.add(x, h.swapaxes(1, 2), fraction, train)
        h = nn.LayerNorm(dtype=self.dtype, name="norm2")(x)
        h = Mlp(self.channel_width, self.dropout, self.dtype, name="channel_mlp")(h, train)
        return self.add(x, h, fraction, train), None


class MlpMixer(PatchNet, kw_only=True):
    """An MLP-Mixer, called as `model(x, train=False)` on (N, H, W, C).

    Dropout follows every dense layer; the paper uses none, and stochastic depth of 0.1 where it
    trains on ImageNet alone.

    Attributes:
        token_width: hidden width of the MLPs over tokens.
        channel_width: hidden width of the MLPs over channels.
    """

    token_width: int
    channel_width: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = self.embed(x)
        x = x.reshape(x.shape[0], -1, self.width)
        widths = {"token_width": self.token_width, "channel_width": self.channel_width}
        return self.classify(jnp.mean(self.blocks(MixerBlock, x, train, **widths), axis=1))
