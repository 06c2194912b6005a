"""Residual networks for small images (depth 6n + 2) and for ImageNet (18 to 152).

He et al., arXiv:1512.03385. Small networks have three stages of two-layer blocks and shortcuts
without parameters (option A), large ones four stages and projections (option B). A bottleneck has
its stride in the 3×3 convolution, unlike in the paper and like most later implementations.
"""

from collections.abc import Sequence

import jax
from flax import linen as nn

from curvax.models.convnets import ConvNet, Style, widened


class ResidualBlock(nn.Module):
    """A shortcut around two 3×3 convolutions, or around 1×1, 3×3, 1×1 with 4 times the channels."""

    width: int
    stride: int
    style: Style
    bottleneck: bool
    projection: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv, normalize = self.style.conv, self.style.normalize
        if self.bottleneck:
            layers = [(self.width, 1, 1), (self.width, 3, self.stride), (4 * self.width, 1, 1)]
        else:
            layers = [(self.width, 3, self.stride), (self.width, 3, 1)]
        h = x
        for n, layer in enumerate(layers, start=1):
            h = h if n == 1 else nn.relu(h)
            h = conv(*layer, name=f"conv{n}", closes=n == len(layers))(h)
            h = normalize(h, train, name=f"norm{n}")
        return nn.relu(h + self.shortcut(x, h.shape[-1], train) if self.style.residual else h)

    def shortcut(self, x: jax.Array, channels: int, train: bool) -> jax.Array:
        if x.shape[-1] == channels and self.stride == 1:
            return x
        if self.projection:
            x = self.style.conv(channels, 1, self.stride, name="conv_shortcut")(x)
            return self.style.normalize(x, train, name="norm_shortcut")
        return widened(x[:, :: self.stride, :: self.stride], channels)


class ResNet(ConvNet, kw_only=True):
    """A residual network, called as `model(x, train=False)` on (N, H, W, C).

    Attributes:
        sizes: blocks in each stage.
        width: channels of the first stage, doubled by each further stage.
        imagenet: True for a 7×7 stem with pooling and projections, False for a 3×3 stem and padded
            shortcuts.
        bottleneck: whether blocks are bottlenecks.
    """

    sizes: Sequence[int]
    width: int
    imagenet: bool = False
    bottleneck: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        style = self.style()
        stem = (7, 2) if self.imagenet else (3, 1)
        x = style.conv(self.width, *stem, name="conv")(x)
        x = nn.relu(style.normalize(x, train, name="norm"))
        if self.imagenet:
            x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        x = self.stages(
            ResidualBlock,
            x,
            train,
            self.sizes,
            [self.width * 2**n for n in range(len(self.sizes))],
            bottleneck=self.bottleneck,
            projection=self.imagenet,
        )
        return self.classify(x)
