"""Fully connected networks: a perceptron for classification or regression, a deep autoencoder."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn

from curvax.models.layers import classify, require_choice

ACTIVATIONS = {"tanh": nn.tanh, "relu": nn.relu, "gelu": nn.gelu, "sigmoid": nn.sigmoid}


class _Network(nn.Module, kw_only=True):
    """The options of hidden layers that both networks share."""

    activation: str = "tanh"
    dtype: Any = None

    def __post_init__(self) -> None:
        require_choice("activation", self.activation, ACTIVATIONS)
        super().__post_init__()


class Perceptron(_Network, kw_only=True):
    """A perceptron, called as `model(x, train=False)` on inputs (N, ...), which are flattened.

    Attributes:
        classes: number of logits or of regression targets.
        widths: widths of the hidden layers.
        activation: `tanh`, `relu`, `gelu` or `sigmoid`.
        dtype: of activations; inferred from inputs and parameters where None.
    """

    classes: int
    widths: Sequence[int]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = _hidden(self, x.reshape(len(x), -1), self.widths, "layer")
        return classify(x, self.classes, bias=0.0, init=nn.initializers.lecun_normal())


class Autoencoder(_Network, kw_only=True):
    """A deep autoencoder with a linear code, called as `model(x, train=False)`.

    The layers of Hinton and Salakhutdinov, Science 313 (2006), and Martens, ICML 2010, with the
    initialisation and tanh of kfac-jax. Inputs (N, ...) are flattened; the outputs are logits in
    the shape of the inputs.

    Attributes:
        widths: widths of the encoder's hidden layers, reversed for the decoder.
        code: width of the code.
        activation: `tanh`, `relu`, `gelu` or `sigmoid`; the code has none.
        dtype: of activations; inferred from inputs and parameters where None.
    """

    widths: Sequence[int]
    code: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        h = x.reshape(len(x), -1)
        pixels = h.shape[-1]
        h = _hidden(self, h, self.widths, "encoder")
        h = nn.Dense(self.code, dtype=self.dtype, name="code")(h)
        h = _hidden(self, h, self.widths[::-1], "decoder")
        logits = classify(h, pixels, bias=0.0, init=nn.initializers.lecun_normal())
        return logits.reshape(x.shape)


def _hidden(model: _Network, h: jax.Array, widths: Sequence[int], name: str) -> jax.Array:
    """Applies dense layers `name0`, `name1`, ... of these widths, in the scope of the model."""
    for n, width in enumerate(widths):
        h = ACTIVATIONS[model.activation](nn.Dense(width, dtype=model.dtype, name=f"{name}{n}")(h))
    return h
