"""Pyramidal networks: bottlenecks whose width grows by a constant in each block; ShakeDrop.

Han et al., arXiv:1610.02915: block k of K has 16 + α k / K channels, times 4 at its end. Yamada et
al., ShakeDrop, arXiv:1802.02375, put noise on the branches. As in google-research/sam, and unlike
in the paper of Han et al., widths are rounded to the nearest number, not down (0.16 of 26 million
parameters). Unlike there, the head's kernel is drawn from a normal distribution of variance
1 / features, as that of the other networks here, and SAM's first gradient too has β ≠ α.
"""

import jax
from flax import linen as nn

from curvax.models.convnets import Style, widened
from curvax.models.layers import require_rate
from curvax.models.shaking import ShakenNet, shake_drop

STEM = 16  # channels


class PyramidBlock(nn.Module):
    """A shortcut around 1×1, 3×3, 1×1 convolutions with a norm at the start and after each.

    `drop` is the probability of noise instead of the branch.
    """

    width: int
    stride: int
    style: Style
    drop: float
    true_gradient: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv, normalize = self.style.conv, self.style.normalize
        h = conv(self.width, 1, name="conv1")(normalize(x, train, name="norm1"))
        h = nn.relu(normalize(h, train, name="norm2"))
        h = conv(self.width, 3, self.stride, name="conv2")(h)
        h = nn.relu(normalize(h, train, name="norm3"))
        h = conv(4 * self.width, 1, name="conv3", closes=True)(h)
        h = self.shaken(normalize(h, train, name="norm4"), train)
        return h + self.shortcut(x) if self.style.residual else h

    def shaken(self, branch: jax.Array, train: bool) -> jax.Array:
        """The branch with noise in training, in evaluation its expectation over the noise."""
        if not self.drop:
            return branch
        keep = 1.0 - self.drop
        if not train:
            return keep * branch
        key = self.make_rng("dropout")
        return shake_drop(key, branch, keep, true_gradient=self.true_gradient)

    def shortcut(self, x: jax.Array) -> jax.Array:
        if self.stride > 1:
            window = (self.stride, self.stride)
            x = nn.avg_pool(x, window, window, "SAME", count_include_pad=False)
        return widened(x, 4 * self.width)


class PyramidNet(ShakenNet, kw_only=True):
    """A pyramidal network, called as `model(x, train=False)` on (N, H, W, C).

    Attributes:
        depth: 9n + 2, for three stages of n bottlenecks.
        alpha: α, the channels that all blocks add to the 16 of the stem.
        shake_drop: probability of noise instead of the branch in the last block, linear in depth;
            0 for a network without ShakeDrop.
    """

    depth: int
    alpha: float
    shake_drop: float = 0.5

    def __post_init__(self) -> None:
        require_rate("shake_drop", self.shake_drop)
        if self.depth < 11 or self.depth % 9 != 2 or self.alpha < 0:
            raise ValueError(
                "A PyramidNet has a `depth` of 9n + 2 (11, 20, 29, ...) and an `alpha` >= 0, and "
                f"got {self.depth} and {self.alpha}. The name of depth 272 with α = 200 is "
                "`pyramidnet272_200`."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        style, block = self.style(), self.recomputed(PyramidBlock)
        x = style.normalize(style.conv(STEM, name="conv")(x), train, name="norm_stem")
        size = (self.depth - 2) // 9
        for k in range(1, 3 * size + 1):
            depth = k / (3 * size)
            stage, n = divmod(k - 1, size)
            stride = 2 if stage and not n else 1
            options = {"drop": self.shake_drop * depth, "true_gradient": self.true_gradient}
            width = round(STEM + self.alpha * depth)
            x = block(width, stride, style, **options, name=f"stage{stage}_block{n}")(x, train)
        return self.classify(nn.relu(style.normalize(x, train, name="norm")))
