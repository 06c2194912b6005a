"""Shake-Shake: residual blocks of two branches, mixed at random for each image.

Gastaldi, arXiv:1705.07485: 26 2×96d has depth 26 = 6n + 2 and three stages of n blocks with
branches of 96, 192 and 384 channels. As in google-research/sam, and unlike in the author's code, no
ReLU stands before the convolutions of a shortcut, and the second of them sees the pixels one to the
right and below, not to the left and above. Unlike in google-research/sam, the head's kernel is
drawn from a normal distribution of variance 1 / features, as that of the other networks here, and
SAM's first gradient too has β ≠ α.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from curvax.models.convnets import Style
from curvax.models.shaking import ShakenNet, shake_shake


class ShakeShakeBlock(nn.Module):
    """A shortcut around two branches of twice ReLU, 3×3 convolution and norm."""

    width: int
    stride: int
    style: Style
    true_gradient: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        a, b = (self.branch(x, train, name) for name in ("a", "b"))
        if train:
            key = self.make_rng("dropout")
            mixed = shake_shake(key, a, b, true_gradient=self.true_gradient)
        else:
            mixed = (a + b) / 2
        return mixed + self.shortcut(x, train) if self.style.residual else mixed

    def branch(self, x: jax.Array, train: bool, name: str) -> jax.Array:
        conv, normalize = self.style.conv, self.style.normalize
        h = conv(self.width, 3, self.stride, name=f"conv1_{name}")(nn.relu(x))
        h = nn.relu(normalize(h, train, name=f"norm1_{name}"))
        h = conv(self.width, name=f"conv2_{name}", closes=True)(h)
        return normalize(h, train, name=f"norm2_{name}")

    def shortcut(self, x: jax.Array, train: bool) -> jax.Array:
        """The input, or two halves of the channels from every other pixel and their neighbours."""
        if x.shape[-1] == self.width and self.stride == 1:
            return x
        neighbours = jnp.pad(x[:, 1:, 1:], ((0, 0), (0, 1), (0, 1), (0, 0)))
        halves = [
            self.style.conv(self.width // 2, 1, name=f"conv_shortcut_{name}")(
                pixels[:, :: self.stride, :: self.stride]
            )
            for name, pixels in (("a", x), ("b", neighbours))
        ]
        return self.style.normalize(jnp.concatenate(halves, -1), train, name="norm_shortcut")


class ShakeShake(ShakenNet, kw_only=True):
    """A Shake-Shake network, called as `model(x, train=False)` on (N, H, W, C).

    Attributes:
        depth: 6n + 2.
        width: channels of each branch in the first stage, even; doubled by each further stage.
    """

    depth: int
    width: int

    def __post_init__(self) -> None:
        if self.depth < 8 or self.depth % 6 != 2 or self.width < 2 or self.width % 2:
            raise ValueError(
                "A Shake-Shake network has a `depth` of 6n + 2 (8, 14, 20, ...) and an even "
                f"`width`, and got {self.depth} and {self.width}. The name of 26 2×96d is "
                "`shakeshake26_96`."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        style = self.style()
        x = style.normalize(style.conv(16, name="conv")(x), train, name="norm")
        sizes = [(self.depth - 2) // 6] * 3
        widths = [self.width * 2**n for n in range(3)]
        noise = {"true_gradient": self.true_gradient}
        x = self.stages(ShakeShakeBlock, x, train, sizes, widths, **noise)
        return self.classify(nn.relu(x))
