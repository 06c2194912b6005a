"""A recommendation model: embeddings of categories, their dot products, and two perceptrons.

DLRM of Naumov et al., arXiv:1906.00091, section 2.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from curvax.models.layers import classify

KERNEL = nn.initializers.variance_scaling(1.0, "fan_avg", "normal")
"""Normal of variance 2 / (inputs + outputs), as in the authors' code."""


class Recommender(nn.Module, kw_only=True):
    """DLRM, called as `model(x, train=False)` on numbers and then categories (N, D + T).

        t₀ = bottom(x₁ … x_D),   tᵢ = Eᵢ[x_D+i],   z = top([t₀, {<tᵢ, tⱼ> : i > j}])

    The T last columns are integral; the tables E are initialised uniformly in ±1/√rows. This
    differs from the authors' code (facebookresearch/dlrm) in: 1. the outputs are logits, before the
    sigmoid; 2. an example has one category in each column, not a bag of them; 3. the bias of the
    last layer starts at zero.

    Attributes:
        classes: number of logits; 1 for a click or none.
        categories: the number of categories in each of the T last columns. An index from that
            number on makes the logits NaN.
        width: of the embeddings and of t₀.
        bottom, top: widths of the hidden layers of the two networks, all with ReLU.
        dtype: of activations; inferred from inputs and parameters where None.
    """

    classes: int
    categories: Sequence[int] = ()
    width: int
    bottom: Sequence[int]
    top: Sequence[int]
    dtype: Any = None

    def __post_init__(self) -> None:
        if not self.categories or min(self.categories) < 1:
            raise ValueError(
                "`categories` has the number of categories, from 1, of each of the last columns, "
                f"and got {self.categories}. Give them, as in `categories=(16, 3)`."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        numbers, indices = self._parts(x)
        vectors = [self._layers(numbers, (*self.bottom, self.width), "bottom")]
        for i, count in enumerate(self.categories):
            vectors.append(self._table(count, f"table{i}")(indices[:, i]))
        t = jnp.stack(vectors, axis=1)
        products = jnp.einsum("nic,njc->nij", t, t)
        pairs = products[:, *np.tril_indices(t.shape[1], -1)]
        h = self._layers(jnp.concatenate([t[:, 0], pairs], axis=1), self.top, "top")
        return classify(h, self.classes, bias=0.0, init=KERNEL)

    def _parts(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The numeric columns, and the categories as integers."""
        split = x.shape[-1] - len(self.categories)
        if x.ndim != 2 or split < 1:
            raise ValueError(
                f"A recommender takes inputs (N, D + {len(self.categories)}), at least one number "
                f"and then the categories of the {len(self.categories)} tables of its "
                f"`categories`, and got {x.shape}. Change the inputs or `categories`."
            )
        return x[:, :split], x[:, split:].astype(jnp.int32)

    def _table(self, count: int, name: str) -> nn.Embed:
        bound = count**-0.5
        init = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
        return nn.Embed(count, self.width, embedding_init=init, dtype=self.dtype, name=name)

    def _layers(self, h: jax.Array, widths: Sequence[int], name: str) -> jax.Array:
        """Applies dense layers `name0`, `name1`, ... with ReLU, in the scope of the model."""
        for n, width in enumerate(widths):
            bias = nn.initializers.normal(width**-0.5)
            dense = functools.partial(nn.Dense, kernel_init=KERNEL, bias_init=bias)
            h = nn.relu(dense(width, dtype=self.dtype, name=f"{name}{n}")(h))
        return h
