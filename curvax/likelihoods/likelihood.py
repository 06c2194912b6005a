"""The base class of likelihoods: -log r(y|z) of outputs z, as a weighted mean over sites."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from curvax.arithmetic import safe_math, trees
from curvax.arithmetic.trees import Tree
from curvax.likelihoods import batch_entries
from curvax.likelihoods.batch_entries import Entry


@dataclasses.dataclass(frozen=True)
class Likelihood(abc.ABC):
    """A negative log-likelihood as a loss `loss(outputs, batch) -> scalar`.

        L = Σᵢ wᵢ ℓ(zᵢ, yᵢ) / Σᵢ wᵢ,   ℓ(z, y) = -log r(y|z)

    A site i is a position that has its own weight, an example or a token. The families are
    exponential in their outputs, so that ∇²ℓ does not depend on the target and the Gauss-Newton
    matrix equals the Fisher matrix. Martens, arXiv:1412.1193, section 9.

    Args:
        targets: a key of the batch or a callable `batch -> array`.
        mask: a key or callable for a boolean array, False at sites to ignore, even if they are NaN.
        weights: a key or callable for weights w >= 0 of the sites.
    """

    targets: Entry
    mask: Entry = None
    weights: Entry = None

    def __post_init__(self) -> None:
        for name, entry in vars(self).items():
            batch_entries.check_entry(entry, self._option(name))

    @property
    def name(self) -> str:
        """The name of the factory in `curvax`, for errors."""
        return type(self).__name__.lower()

    @property
    def weighted(self) -> bool:
        """Whether sites can have different weights."""
        return self.mask is not None or self.weights is not None

    def on_labels(self, labels: jax.Array) -> Likelihood:
        """The same likelihood with these targets."""
        return dataclasses.replace(self, targets=lambda batch: labels)

    def check_batch(self, batch: Tree) -> None:
        """Checks that the batch has the keys named by this likelihood.

        Raises:
            ValueError: a key is missing.
        """
        for name, entry in vars(self).items():
            if entry is not None and not callable(entry):
                batch_entries.read(entry, batch, self._option(name))

    def label_shape(self, batch: Tree) -> tuple[int, ...]:
        """The shape of hard targets, which `sample` returns and `on_labels` takes."""
        return self._read("targets", batch).shape

    def total_weight(self, batch: Tree) -> jax.Array:
        """Σ w, a scalar; the number of sites if there is neither mask nor weights."""
        return jnp.sum(self._weights(batch))

    def site_weights(self, outputs: jax.Array, batch: Tree) -> jax.Array:
        """w / Σ w, [*sites, 1, ...] with as many axes as the outputs; 0 if all weights are 0."""
        dtype = self._check(outputs, batch)
        w = self._weights(batch)
        return batch_entries.with_axes(trees.ratio(w, jnp.sum(w)).astype(dtype), outputs.ndim)

    def __call__(self, outputs: Any, batch: Tree) -> jax.Array:
        """The loss L, a scalar in float32 or wider; 0 if all weights are 0."""
        z, y, w = self._at(outputs, batch)
        return jnp.sum(w * self._losses(z, y))

    def scores(self, outputs: jax.Array, batch: Tree) -> jax.Array:
        """∇_z ℓ at each site, unweighted, shaped like the outputs; 0 where the weight is 0."""
        z, y, w = self._at(outputs, batch)
        gradient = jax.grad(lambda z: jnp.sum(self._losses(z, y)))(z)
        return _kept(w, gradient).astype(outputs.dtype)

    def hessian_product(self, outputs: jax.Array, batch: Tree, v: jax.Array) -> jax.Array:
        """∇²L v in the outputs, w/Σw · Cov(y) v at each site, shaped like the outputs."""
        z, _, w = self._at(outputs, batch)
        return (w * self._covariance(z, _kept(w, trees.widen(v)))).astype(outputs.dtype)

    def root(self, outputs: jax.Array, batch: Tree, e: jax.Array) -> jax.Array:
        """B e, where B Bᵀ = ∇²L in the outputs; e and the result are shaped like the outputs."""
        z, _, w = self._at(outputs, batch)
        return (safe_math.root(w) * self._root(z, trees.widen(e))).astype(outputs.dtype)

    def root_transpose(self, outputs: jax.Array, batch: Tree, u: jax.Array) -> jax.Array:
        """Bᵀ u, shaped like the outputs."""
        z, _, w = self._at(outputs, batch)
        u = _kept(w, trees.widen(u))
        return (safe_math.root(w) * self._root_transpose(z, u)).astype(outputs.dtype)

    def sample(self, keys: jax.Array, outputs: jax.Array, batch: Tree) -> jax.Array:
        """Draws labels y ~ r(·|z).

        Args:
            keys: typed keys, one for each example of the leading axis.
            outputs: z.
            batch: the batch, of which mask and weights are read.

        Returns:
            An array shaped like hard targets, of integers for `categorical` and floats otherwise.
        """
        z, _, _ = self._at(outputs, batch)
        return jax.vmap(self._draw)(keys, z)

    def _at(self, outputs: jax.Array, batch: Tree) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(z, y, w / Σw) with as many axes as the outputs, z in float32 or wider.

        Outputs and targets of weight 0 are replaced by 0, so that NaNs in them do not reach the
        loss or its derivatives.
        """
        w, z = self.site_weights(outputs, batch), trees.widen(outputs)
        y = _kept(w, batch_entries.with_axes(self._read("targets", batch), z.ndim))
        return _kept(w, z), self._observed(y, z), w

    def _check(self, outputs: Any, batch: Tree) -> Any:
        """The dtype to compute in, that of the outputs or float32, whichever is wider.

        Raises:
            TypeError: the outputs are not a floating array.
            ValueError: the shape of the targets does not match.
        """
        if not hasattr(outputs, "dtype") or not trees.is_float(outputs):
            raise TypeError(
                f"`{self.name}` takes the outputs of the model as one floating array, and received "
                f"{_described(outputs)}. {self._cure_for_trees}"
            )
        self._check_targets(outputs.shape, self._read("targets", batch))
        return trees.wide_dtype(outputs.dtype)

    def _read(self, name: str, batch: Tree) -> jax.Array:
        return batch_entries.read(getattr(self, name), batch, self._option(name))

    def _weights(self, batch: Tree) -> jax.Array:
        """The weight of each site, in the default float dtype."""
        factors = {
            name: self._read(name, batch)
            for name in ("mask", "weights")
            if getattr(self, name) is not None
        }
        if "mask" in factors:
            batch_entries.check_mask(factors["mask"], self._option("mask"))
        longest = max((x.ndim for x in factors.values()), default=0)
        shape = self._sites(self._read("targets", batch), longest)
        w = jnp.ones(shape, jnp.result_type(float))
        for name, factor in factors.items():
            w = w * batch_entries.spread(factor, shape, self._option(name))
        return w

    def _option(self, name: str) -> str:
        return f"`{self.name}(targets)`" if name == "targets" else f"`{self.name}({name}=)`"

    @property
    def _cure_for_trees(self) -> str:
        return (
            "If the model also returns its new state, write `Objective(..., has_aux=True)`; "
            "otherwise return only the array of outputs."
        )

    @abc.abstractmethod
    def _sites(self, targets: jax.Array, ndim: int) -> tuple[int, ...]:
        """The shape of the sites, if the weights have `ndim` axes."""

    @abc.abstractmethod
    def _check_targets(self, outputs: tuple[int, ...], targets: jax.Array) -> None:
        """Raises if the targets do not match outputs of this shape."""

    @abc.abstractmethod
    def _observed(self, y: jax.Array, z: jax.Array) -> jax.Array:
        """The sufficient statistic of the targets, shaped and typed like z."""

    @abc.abstractmethod
    def _losses(self, z: jax.Array, y: jax.Array) -> jax.Array:
        """-log r(y|z), with as many axes as z."""

    @abc.abstractmethod
    def _covariance(self, z: jax.Array, v: jax.Array) -> jax.Array:
        """∇²ℓ v = Cov(y) v at each site."""

    @abc.abstractmethod
    def _root(self, z: jax.Array, e: jax.Array) -> jax.Array:
        """B e at each site, where B Bᵀ = Cov(y)."""

    @abc.abstractmethod
    def _root_transpose(self, z: jax.Array, u: jax.Array) -> jax.Array:
        """Bᵀ u at each site."""

    @abc.abstractmethod
    def _draw(self, key: jax.Array, z: jax.Array) -> jax.Array:
        """The labels of one example."""


def _kept(weight: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(weight > 0, x, jnp.zeros((), x.dtype))


def _described(outputs: Any) -> str:
    if hasattr(outputs, "dtype"):
        return f"{outputs.dtype}{list(jnp.shape(outputs))}"
    return f"a {type(outputs).__name__} of {len(jax.tree.leaves(outputs))} arrays"
