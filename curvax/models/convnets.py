"""What the residual networks share: convolutions under one norm, stages, their options."""

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


@dataclass(frozen=True)
class Style:
    """How the convolutions of a network are normalised, joined and computed."""

    norm: str
    residual: bool
    dtype: Any
    sync_over: Along | tuple[str, ...] | None

    def conv(
        self, channels: int, window: int = 3, stride: int = 1, *, name: str, closes: bool = False
    ) -> nn.Conv:
        """A convolution, with a bias where no norm follows that has one.

        The one that closes a residual branch starts at zero where nothing is normalised:
        activations would double their variance in every block. Zhang et al., Fixup,
        arXiv:1901.09321.
        """
        bare = self.norm == "none"
        return nn.Conv(
            channels,
            (window, window),
            stride,
            use_bias=bare,
            kernel_init=nn.initializers.zeros if bare and closes and self.residual else HE,
            dtype=self.dtype,
            name=name,
        )

    def normalize(self, x: jax.Array, train: bool, *, name: str) -> jax.Array:
        """Batch norm, group norm or nothing, on (N, H, W, C)."""
        if self.norm == "batch":
            return nn.BatchNorm(
                use_running_average=not train,
                momentum=0.9,
                dtype=self.dtype,
                name=name,
                **synced(self.sync_over if train else None),
            )(x)
        if self.norm == "group":
            size = gcd(x.shape[-1], GROUP_SIZE)
            return nn.GroupNorm(None, size, dtype=self.dtype, name=name)(x)
        return x


def synced(over: Along | tuple[str, ...] | None) -> dict[str, Any]:
    """What `nn.BatchNorm` is told to take its statistics over devices."""
    if isinstance(over, Neighbours):
        return {"axis_name": over.axis, "axis_index_groups": over.rows}
    return {"axis_name": over}


class ConvNet(nn.Module, kw_only=True):
    """The options of every residual network.

    Attributes:
        classes: number of logits.
        norm: `batch`, `group` or `none`.
        residual: whether the shortcuts are there; the papers' landscapes are of nets without.
        remat: whether blocks are recomputed in the backward pass.
        dtype: of activations; inferred from inputs and parameters where None.
        sync_over: device axis, or a tuple of them, over which batch norm takes its statistics in
            training, or `curvax.axes.Neighbours`, devices in a row along one.
        head_bias: initial bias of the logits; -10 suits a sigmoid loss over many classes.
    """

    classes: int
    norm: str = "batch"
    residual: bool = True
    remat: bool = False
    dtype: Any = None
    sync_over: Along | tuple[str, ...] | None = None
    head_bias: float = 0.0

    def __post_init__(self) -> None:
        require_choice("norm", self.norm, NORMS)
        super().__post_init__()

    def style(self) -> Style:
        return Style(self.norm, self.residual, self.dtype, self.sync_over)

    def stages(
        self,
        block: type[nn.Module],
        x: jax.Array,
        train: bool,
        sizes: Sequence[int],
        widths: Sequence[int],
        **options: Any,
    ) -> jax.Array:
        """x through stages of `sizes` blocks, every stage but the first halving the image."""
        if self.remat:
            block = nn.remat(block, static_argnums=(2,))
        for stage, (size, width) in enumerate(zip(sizes, widths, strict=True)):
            for n in range(size):
                stride = 2 if stage and not n else 1
                name = f"stage{stage}_block{n}"
                x = block(width, stride, self.style(), **options, name=name)(x, train)
        return x

    def classify(self, x: jax.Array) -> jax.Array:
        """Logits from the mean over the image."""
        init = nn.initializers.lecun_normal()
        return classify(jnp.mean(x, axis=(1, 2)), self.classes, bias=self.head_bias, init=init)
