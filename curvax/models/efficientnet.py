"""EfficientNet: inverted bottlenecks with squeeze-and-excitation, scaled in width and depth.

Tan and Le, arXiv:1905.11946. Batch norm has the momentum 0.99 and the epsilon 1e-3 of
google-research/sam, which follows the authors' code. The head's kernel is drawn from a normal
distribution of variance 1 / features, as that of the other networks here; theirs is uniform. The
parameters do not depend on the size of the images.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from curvax.models.convnets import ConvNet, Style
from curvax.models.layers import drop_branch, require_rate

SQUEEZE = 4  # section 4: the squeeze of squeeze-and-excitation, of the block's input channels
BATCH_NORM = {"momentum": 0.99, "epsilon": 1e-3}


class MBConvs(NamedTuple):
    """A stage of blocks before scaling."""

    window: int
    stride: int
    expand: int
    channels: int
    repeats: int


B0 = (
    MBConvs(3, 1, 1, 16, 1),
    MBConvs(3, 2, 6, 24, 2),
    MBConvs(5, 2, 6, 40, 2),
    MBConvs(3, 2, 6, 80, 3),
    MBConvs(5, 1, 6, 112, 3),
    MBConvs(5, 2, 6, 192, 4),
    MBConvs(3, 1, 6, 320, 1),
)
"""Table 1; the stem has 32 channels and the last convolution 1280."""
STEM, TOP = 32, 1280


class Scaling(NamedTuple):
    """The factors of width and depth, the side of the images and dropout of a size."""

    width: float
    depth: float
    side: int
    dropout: float


SCALINGS = {
    "b0": Scaling(1.0, 1.0, 224, 0.2),
    "b1": Scaling(1.0, 1.1, 240, 0.2),
    "b2": Scaling(1.1, 1.2, 260, 0.3),
    "b3": Scaling(1.2, 1.4, 300, 0.3),
    "b4": Scaling(1.4, 1.8, 380, 0.4),
    "b5": Scaling(1.6, 2.2, 456, 0.4),
    "b6": Scaling(1.8, 2.6, 528, 0.5),
    "b7": Scaling(2.0, 3.1, 600, 0.5),
}
"""Of the authors' code; the paper gives the rule, φ for B0 to B7, and dropout from 0.2 to 0.5."""


class MBConv(nn.Module):
    """Expansion, depthwise convolution, squeeze-and-excitation, projection; a shortcut if it fits.

    `drop` is the probability of dropping the branch.
    """

    stage: MBConvs
    style: Style
    drop: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv, normalize = self.style.conv, self.style.normalize
        window, stride, expand, channels, _ = self.stage
        h = x
        if expand > 1:
            h = conv(expand * x.shape[-1], 1, name="conv_expand")(h)
            h = nn.swish(normalize(h, train, name="norm_expand"))
        h = conv(h.shape[-1], window, stride, depthwise=True, name="conv_depthwise")(h)
        h = nn.swish(normalize(h, train, name="norm_depthwise"))
        h = h * self.gates(h, max(1, x.shape[-1] // SQUEEZE))
        h = conv(channels, 1, name="conv_project", closes=True)(h)
        h = normalize(h, train, name="norm_project")
        if stride > 1 or channels != x.shape[-1] or not self.style.residual:
            return h
        if train and self.drop:
            h = drop_branch(self.make_rng("dropout"), h, self.drop)
        return x + h

    def gates(self, h: jax.Array, squeezed: int) -> jax.Array:
        """A factor in (0, 1) for each channel, from the means over the image: (N, 1, 1, C)."""
        dense = lambda features, name: nn.Dense(features, dtype=self.style.dtype, name=name)
        means = jnp.mean(h, axis=(1, 2), keepdims=True)
        return nn.sigmoid(dense(h.shape[-1], "excite")(nn.swish(dense(squeezed, "squeeze")(means))))


class EfficientNet(ConvNet, kw_only=True):
    """An EfficientNet, called as `model(x, train=False)` on (N, H, W, C).

    Attributes:
        width: factor of the channels, which are then rounded to multiples of 8.
        depth: factor of the blocks of each stage, which are then rounded up.
        dropout: probability, before the classifier.
        stochastic_depth: probability of dropping a branch, linear in depth from 0 at the first
            block; reached behind the last one.
        blocks: the stages before scaling.
    """

    width: float = 1.0
    depth: float = 1.0
    dropout: float = 0.2
    stochastic_depth: float = 0.2
    blocks: Sequence[MBConvs] = B0

    def __post_init__(self) -> None:
        require_rate("dropout", self.dropout)
        require_rate("stochastic_depth", self.stochastic_depth)
        if self.width <= 0 or self.depth <= 0:
            raise ValueError(
                f"`width` and `depth` are factors > 0, and were {self.width} and {self.depth}. "
                "The names of the published ones are `efficientnet_b0` to `efficientnet_b7`."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        style, block = self.style(**BATCH_NORM), self.recomputed(MBConv)
        x = style.conv(rounded(STEM, self.width), 3, 2, name="conv_stem")(x)
        x = nn.swish(style.normalize(x, train, name="norm_stem"))
        scaled = dict(self.scaled())
        for n, (name, stage) in enumerate(scaled.items()):
            drop = self.stochastic_depth * n / len(scaled)
            x = block(stage, style, drop, name=name)(x, train)
        x = style.conv(rounded(TOP, self.width), 1, name="conv_top")(x)
        x = nn.swish(style.normalize(x, train, name="norm_top"))
        means = jnp.mean(x, axis=(1, 2), keepdims=True)
        return self.classify(nn.Dropout(self.dropout)(means, deterministic=not train))

    def scaled(self) -> Iterator[tuple[str, MBConvs]]:
        """The name of each block and its scaled stage, with the stride in the first block alone."""
        for number, stage in enumerate(self.blocks):
            channels = rounded(stage.channels, self.width)
            for n in range(math.ceil(self.depth * stage.repeats)):
                stride = 1 if n else stage.stride
                name = f"stage{number}_block{n}"
                yield name, stage._replace(stride=stride, channels=channels)


def rounded(channels: int, width: float, divisor: int = 8) -> int:
    """The nearest multiple of 8 to the scaled channels, or the next one if it is below 90 %."""
    scaled = channels * width
    nearest = max(divisor, int(scaled + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * scaled else nearest
