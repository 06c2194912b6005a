"""Networks of residual blocks: depth as one scan, stochastic depth, common options."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from curvax.models.layers import classify, drop_branch, require_rate


class Block(nn.Module, kw_only=True):
    """A block of residual branches, called as `block(x, fraction, train) -> (x, None)`.

    `fraction` is the relative depth of the block, 0 for the first and 1 for the last.
    """

    dropout: float
    stochastic_depth: float
    dtype: Any

    def add(self, x: jax.Array, branch: jax.Array, fraction: jax.Array, train: bool) -> jax.Array:
        """x + branch, where stochastic depth may drop the branch in training."""
        if train and self.stochastic_depth:
            rate = self.stochastic_depth * fraction
            branch = drop_branch(self.make_rng("dropout"), branch, rate)
        return x + branch


class BlockNet(nn.Module, kw_only=True):
    """The options of every network of blocks.

    Attributes:
        classes: number of logits.
        width: features of each token.
        depth: number of blocks.
        dropout: probability, in the places that the model's docstring names.
        stochastic_depth: probability of dropping the branches of the last block; linear in depth
            from 0 at the first.
        scan: compile the blocks once, with weights stacked under `block`; else they are
            `block_0`, `block_1`, ...
        remat: recompute each block in the backward pass.
        dtype: of activations; inferred from inputs and parameters where None.
        head_bias: initial bias of the logits; -10 suits a sigmoid loss over many classes.
    """

    classes: int
    width: int
    depth: int
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    scan: bool = True
    remat: bool = False
    dtype: Any = None
    head_bias: float = 0.0

    def __post_init__(self) -> None:
        require_rate("dropout", self.dropout)
        require_rate("stochastic_depth", self.stochastic_depth)
        super().__post_init__()

    def blocks(self, block: type[Block], x: jax.Array, train: bool, **options: Any) -> jax.Array:
        """Applies `depth` blocks and a final norm to x, (N, tokens, width)."""
        options |= {
            "dropout": self.dropout,
            "stochastic_depth": self.stochastic_depth,
            "dtype": self.dtype,
        }
        fractions = jnp.linspace(0.0, 1.0, self.depth)
        body: Any = block
        if self.remat:
            body = nn.remat(body, prevent_cse=not self.scan, static_argnums=(3,))
        if self.scan:
            stacked = nn.scan(
                body,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast),
                length=self.depth,
            )
            x, _ = stacked(**options, name="block")(x, fractions, train)
        else:
            for n in range(self.depth):
                x, _ = body(**options, name=f"block_{n}")(x, fractions[n], train)
        return nn.LayerNorm(dtype=self.dtype, name="norm")(x)

    def classify(self, x: jax.Array) -> jax.Array:
        """Logits from features (N, ..., width); the kernel is initialised to zero."""
        init = nn.initializers.zeros
        return classify(x, self.classes, bias=self.head_bias, init=init)
