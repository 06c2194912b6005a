"""An encoder with a projection head: images in several views ↦ embeddings for a contrastive loss.

Khosla et al., Supervised Contrastive Learning, arXiv:2004.11362, section 3.1. The head is dropped
after training, and a linear classifier reads the representation in front of it.
"""

from typing import Any

import jax
from flax import linen as nn


class ProjectionNet(nn.Module, kw_only=True):
    """An encoder and a projection head, called as `model(x, train=False)` on (N, views, ...).

    Returns embeddings (N, views, outputs), which the loss normalises. The encoder's parameters keep
    their names, and those of the head are under `head`, so that `init_from` reads a classifier's
    weights as well, and a classifier reads these.

    Attributes:
        encoder: a network that returns its representation, one of `build(name, classes=0)`.
        outputs: size of the embeddings; the paper's 128.
    """

    encoder: nn.Module
    outputs: int = 128

    def setup(self) -> None:
        nn.share_scope(self, self.encoder)
        self.head = ProjectionHead(outputs=self.outputs)

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        each = self.represent(x.reshape(-1, *x.shape[2:]), train)
        return self.head(each).reshape(*x.shape[:2], self.outputs)

    def represent(self, x: jax.Array, train: bool = False) -> jax.Array:
        """The representation in front of the head, (N, width), of (N, ...)."""
        encoder: Any = self.encoder
        return encoder(x, train)


class ProjectionHead(nn.Module, kw_only=True):
    """Dense, ReLU, dense without bias; the hidden layer is as wide as the representation.

    That is the authors' head on a ResNet-50, of width 2048; for narrower networks the two codes
    differ, and this is PyTorch's, apart from the missing bias, which is TensorFlow's.

    Attributes:
        outputs: size of the embeddings.
    """

    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.relu(nn.Dense(x.shape[-1], name="hidden")(x))
        return nn.Dense(self.outputs, use_bias=False, name="projection")(h)
