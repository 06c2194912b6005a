"""Wide residual networks: few wide blocks with the activation before each convolution.

Zagoruyko and Komodakis, arXiv:1605.07146: WRN-d-k has depth d = 6n + 4 and three stages of n
blocks with 16k, 32k and 64k channels.
"""

import jax
from flax import linen as nn

from curvax.models.convnets import ConvNet, Style
from curvax.models.layers import require_rate


class WideBlock(nn.Module):
    """A shortcut around twice norm, ReLU and 3×3 convolution, with dropout in between."""

    width: int
    stride: int
    style: Style
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv, normalize = self.style.conv, self.style.normalize
        active = nn.relu(normalize(x, train, name="norm1"))
        h = conv(self.width, 3, self.stride, name="conv1")(active)
        h = nn.relu(normalize(h, train, name="norm2"))
        h = nn.Dropout(self.dropout)(h, deterministic=not train)
        h = conv(self.width, name="conv2", closes=True)(h)
        if not self.style.residual:
            return h
        if x.shape != h.shape:
            x = conv(self.width, 1, self.stride, name="conv_shortcut")(active)
        return x + h


class WideResNet(ConvNet, kw_only=True):
    """A wide residual network, called as `model(x, train=False)` on (N, H, W, C).

    Attributes:
        depth: 6n + 4.
        widen: the factor k.
        dropout: probability inside the blocks; the paper's variant with dropout has 0.3 on CIFAR.
    """

    depth: int
    widen: int
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_rate("dropout", self.dropout)
        if self.depth < 10 or self.depth % 6 != 4 or self.widen < 1:
            raise ValueError(
                "A wide ResNet has a `depth` of 6n + 4 (10, 16, 22, 28, ...) and a `widen` >= 1, "
                f"and got {self.depth} and {self.widen}. The name of WRN-28-10 is `wrn28_10`."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        style = self.style()
        x = style.conv(16, name="conv")(x)
        sizes = [(self.depth - 4) // 6] * 3
        widths = [16 * self.widen * 2**n for n in range(3)]
        x = self.stages(WideBlock, x, train, sizes, widths, dropout=self.dropout)
        return self.classify(nn.relu(style.normalize(x, train, name="norm")))
