"""Residual networks of convolutions: normalised convolutions, stages, common options."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from curvax.devices.axes import Along, Neighbours
from curvax.models.layers import classify, require_choice

NORMS = ("batch", "group", "none")
GROUP_SIZE = 16  # channels; Wu and He, arXiv:1803.08494, Table 3, found it as good as 32 groups
HE = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
HE_DEPTHWISE = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


@dataclass(frozen=True)
class Style:
    """The norm, the shortcuts and the dtype of the convolutions of a network."""

    norm: str
    residual: bool
    dtype: Any
    sync_over: Along | tuple[str, ...] | None
    freeze_norm: bool
    momentum: float
    epsilon: float

    def conv(
        self,
        channels: int,
        window: int = 3,
        stride: int = 1,
        *,
        name: str,
        closes: bool = False,
        depthwise: bool = False,
    ) -> nn.Conv:
        """A convolution, with a bias only if no norm follows.

        Without a norm the last convolution of a residual branch (`closes`) is initialised to zero,
        because activations would otherwise double their variance in each block. Zhang et al.,
        Fixup, arXiv:1901.09321. A `depthwise` convolution filters each channel by itself, so that
        its fan-out is the size of the window: Flax's fan-in.
        """
        bare = self.norm == "none"
        init = HE_DEPTHWISE if depthwise else HE
        return nn.Conv(
            channels,
            (window, window),
            stride,
            use_bias=bare,
            kernel_init=nn.initializers.zeros if bare and closes and self.residual else init,
            feature_group_count=channels if depthwise else 1,
            dtype=self.dtype,
            name=name,
        )

    def normalize(self, x: jax.Array, train: bool, *, name: str) -> jax.Array:
        """Batch norm, group norm or nothing, on (N, H, W, C)."""
        if self.norm == "batch":
            return nn.BatchNorm(
                use_running_average=not train or self.freeze_norm,
                momentum=self.momentum,
                epsilon=self.epsilon,
                dtype=self.dtype,
                name=name,
                **synced(self.sync_over if train else None),
            )(x)
        if self.norm == "group":
            size = gcd(x.shape[-1], GROUP_SIZE)
            return nn.GroupNorm(None, size, dtype=self.dtype, name=name)(x)
        return x


def widened(x: jax.Array, channels: int) -> jax.Array:
    """Zeros for the channels that x (N, H, W, C) lacks."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, channels - x.shape[-1])))


def synced(over: Along | tuple[str, ...] | None) -> dict[str, Any]:
    """The options of `nn.BatchNorm` for statistics over devices."""
    if isinstance(over, Neighbours):
        return {"axis_name": over.axis, "axis_index_groups": over.rows}
    return {"axis_name": over}


class ConvNet(nn.Module, kw_only=True):
    """The options of every residual network.

    Attributes:
        classes: number of logits.
        norm: `batch`, `group` or `none`.
        residual: whether there are shortcuts; some published landscapes are of networks without.
        remat: whether blocks are recomputed in the backward pass.
        dtype: of activations; inferred from inputs and parameters where None.
        sync_over: device axes over which batch norm averages its statistics in training, or
            `Neighbours`, groups of adjacent devices along one axis.
        freeze_norm: whether batch norm keeps its running statistics in training, and normalises by
            them, as Foret et al., arXiv:2010.01412, do in fine-tuning (appendix C.2).
        head_bias: initial bias of the logits; -10 suits a sigmoid loss over many classes.
    """

    classes: int
    norm: str = "batch"
    residual: bool = True
    remat: bool = False
    dtype: Any = None
    sync_over: Along | tuple[str, ...] | None = None
    freeze_norm: bool = False
    head_bias: float = 0.0

    def __post_init__(self) -> None:
        require_choice("norm", self.norm, NORMS)
        super().__post_init__()

    def style(self, *, momentum: float = 0.9, epsilon: float = 1e-5) -> Style:
        """The style of the convolutions, with constants of batch norm."""
        options = (self.norm, self.residual, self.dtype, self.sync_over, self.freeze_norm)
        return Style(*options, momentum, epsilon)

    def recomputed(self, block: type[nn.Module]) -> Any:
        """The block, called as `block(x, train)`, recomputed in the backward pass if `remat`."""
        return nn.remat(block, static_argnums=(2,)) if self.remat else block

    def stages(
        self,
        block: type[nn.Module],
        x: jax.Array,
        train: bool,
        sizes: Sequence[int],
        widths: Sequence[int],
        **options: Any,
    ) -> jax.Array:
        """Applies stages of `sizes` blocks; each stage but the first halves height and width."""
        body = self.recomputed(block)
        for stage, (size, width) in enumerate(zip(sizes, widths, strict=True)):
            for n in range(size):
                stride = 2 if stage and not n else 1
                name = f"stage{stage}_block{n}"
                x = body(width, stride, self.style(), **options, name=name)(x, train)
        return x

    def classify(self, x: jax.Array) -> jax.Array:
        """Logits from the mean over the image."""
        init = nn.initializers.lecun_normal()
        return classify(jnp.mean(x, axis=(1, 2)), self.classes, bias=self.head_bias, init=init)
