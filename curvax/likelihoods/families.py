"""The exponential families: ℓ(z, y) = A(z) - <y, z> + const, with ∇A = E y and ∇²A = Cov(y)."""

import abc

import jax
import jax.numpy as jnp

from curvax.arithmetic import safe_math, trees
from curvax.arithmetic.trees import Tree
from curvax.likelihoods.likelihood import Likelihood
from curvax.likelihoods.sites import Entry


def categorical(targets: Entry, *, mask: Entry = None, weights: Entry = None) -> Likelihood:
    """Cross-entropy of logits: one of C classes at each site.

        ℓ = -Σ_c y_c log p_c,   p = softmax(z),   ∇²ℓ = diag(p) - p pᵀ

    A site is each place with logits: every token of a sequence. With `Objective(model=predict)`
    the outputs of `predict` are the logits, [..., C].

    Args:
        targets: a key of the batch or a callable `batch -> array`; whole numbers in [0, C),
            [...], of which one outside makes the loss NaN unless masked; or rows of
            probabilities, [..., C] (label smoothing, mixup).
        mask: a key or callable: boolean, True where a site counts; along the sites or their first
            axes.
        weights: a key or callable: w >= 0, likewise.

    Raises:
        TypeError: a mask that is not boolean; targets that are neither whole nor floating.
        ValueError: shapes that do not fit; a key that the batch has not.
    """
    return Categorical(targets, mask, weights)


def bernoulli(targets: Entry, *, mask: Entry = None, weights: Entry = None) -> Likelihood:
    """Sigmoid cross-entropy of logits, summed over an example's outputs.

        ℓ = Σ_k -y_k log p_k - (1 - y_k) log(1 - p_k),   p = sigmoid(z),   ∇²ℓ = diag(p (1 - p))

    A site is an example of the leading axis; if mask or weights have more axes, the sites are
    those.

    Args:
        targets: a key of the batch or a callable `batch -> array`; in [0, 1], shaped exactly like
            the outputs.
        mask: a key or callable: boolean, True where a site counts.
        weights: a key or callable: w >= 0 for each site.

    Raises:
        TypeError: a mask that is not boolean.
        ValueError: shapes that do not fit; a key that the batch has not.
    """
    return Bernoulli(targets, mask, weights)


def gaussian(targets: Entry, *, mask: Entry = None, weights: Entry = None) -> Likelihood:
    """Half the squared error, summed over an example's outputs: σ = 1, fixed.

        ℓ = ½ ‖y - z‖²,   ∇²ℓ = I

    A learned variance is refused: its ∇²ℓ depends on the target, and the Gauss-Newton matrix is
    no longer the Fisher matrix. Arguments, sites and errors as in `bernoulli`.

    Args:
        targets: real numbers.
        mask: which sites count.
        weights: how much.
    """
    return Gaussian(targets, mask, weights)


def poisson(targets: Entry, *, mask: Entry = None, weights: Entry = None) -> Likelihood:
    """Counts of which the outputs are the log-rates, summed over an example's outputs.

        ℓ = Σ_k exp(z_k) - y_k z_k,   ∇²ℓ = diag(exp z)

    Without the constant log y!. Arguments, sites and errors as in `bernoulli`.

    Args:
        targets: counts y >= 0.
        mask: which sites count.
        weights: how much.
    """
    return Poisson(targets, mask, weights)


class Categorical(Likelihood):
    """-Σ y log softmax(z)."""

    def label_shape(self, batch: Tree) -> tuple[int, ...]:
        return self._sites(self._read("targets", batch), 0)

    def _sites(self, targets: jax.Array, ndim: int) -> tuple[int, ...]:
        return targets.shape[:-1] if trees.is_float(targets) else targets.shape

    def _check_targets(self, outputs: tuple[int, ...], targets: jax.Array) -> None:
        if not trees.is_float(targets) and not jnp.issubdtype(targets.dtype, jnp.integer):
            raise TypeError(
                "`categorical` takes targets that are whole numbers (classes) or floating "
                f"(probabilities), and these are {targets.dtype}. For two classes coded as one "
                "yes or no, use `bernoulli`; else cast with `.astype(int)`."
            )
        wanted = outputs if trees.is_float(targets) else outputs[:-1]
        if targets.shape != wanted:
            raise ValueError(
                f"`categorical` takes logits [..., C] and targets that are whole numbers [...] or "
                f"probabilities [..., C]. Got logits {list(outputs)} and {targets.dtype} targets "
                f"{list(targets.shape)} where {list(wanted)} fit. Classes stored as floats are "
                "cast with `.astype(int)`, a last axis of size one is dropped with `[..., 0]`."
            )

    def _observed(self, y: jax.Array, z: jax.Array) -> jax.Array:
        if trees.is_float(y):
            return y.astype(z.dtype)
        classes = jnp.arange(z.shape[-1], dtype=y.dtype).reshape(*[1] * (z.ndim - 1), -1)
        known = (y >= 0) & (y < z.shape[-1])
        return jnp.where(known, (y == classes).astype(z.dtype), jnp.nan)

    def _losses(self, z: jax.Array, y: jax.Array) -> jax.Array:
        # A class of probability 0 may have a logit of -∞.
        log_p = jnp.where(y == 0, 0, jax.nn.log_softmax(z))
        return -jnp.sum(y * log_p, axis=-1, keepdims=True)

    def _covariance(self, z: jax.Array, v: jax.Array) -> jax.Array:
        p = jax.nn.softmax(z)
        return p * (v - jnp.sum(p * v, axis=-1, keepdims=True))

    def _root(self, z: jax.Array, e: jax.Array) -> jax.Array:
        p = jax.nn.softmax(z)
        s = safe_math.root(p) * e
        return s - p * jnp.sum(s, axis=-1, keepdims=True)

    def _root_transpose(self, z: jax.Array, u: jax.Array) -> jax.Array:
        p = jax.nn.softmax(z)
        return safe_math.root(p) * (u - jnp.sum(p * u, axis=-1, keepdims=True))

    def _draw(self, key: jax.Array, z: jax.Array) -> jax.Array:
        return jax.random.categorical(key, z)


class Elementwise(Likelihood):
    """A family of one number, with every output of its own."""

    def _sites(self, targets: jax.Array, ndim: int) -> tuple[int, ...]:
        return targets.shape[: max(1, ndim)]

    def _check_targets(self, outputs: tuple[int, ...], targets: jax.Array) -> None:
        if targets.shape != outputs:
            raise ValueError(
                f"`{self.name}` takes targets shaped like the outputs, and got outputs "
                f"{list(outputs)} and targets {list(targets.shape)}: broadcasting would pair each "
                "output with several targets. Drop a last axis of size one with `[..., 0]`, or "
                "add it with `[..., None]`."
            )

    def _observed(self, y: jax.Array, z: jax.Array) -> jax.Array:
        return y.astype(z.dtype)

    @abc.abstractmethod
    def _variance(self, z: jax.Array) -> jax.Array:
        """A''(z)."""

    def _covariance(self, z: jax.Array, v: jax.Array) -> jax.Array:
        return self._variance(z) * v

    def _root(self, z: jax.Array, e: jax.Array) -> jax.Array:
        return safe_math.root(self._variance(z)) * e

    def _root_transpose(self, z: jax.Array, u: jax.Array) -> jax.Array:
        return self._root(z, u)


class Bernoulli(Elementwise):
    """-y log p - (1 - y) log(1 - p), p = sigmoid(z)."""

    def _losses(self, z: jax.Array, y: jax.Array) -> jax.Array:
        return y * jax.nn.softplus(-z) + (1 - y) * jax.nn.softplus(z)

    def _variance(self, z: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)

    def _draw(self, key: jax.Array, z: jax.Array) -> jax.Array:
        return jax.random.bernoulli(key, jax.nn.sigmoid(z)).astype(z.dtype)


class Gaussian(Elementwise):
    """½ (y - z)²."""

    def _check_targets(self, outputs: tuple[int, ...], targets: jax.Array) -> None:
        if outputs in ((*targets.shape[:-1], 2 * targets.shape[-1]), (*targets.shape, 2)):
            raise ValueError(
                f"`gaussian` takes targets shaped like the outputs, and outputs {list(outputs)} "
                f"for targets {list(targets.shape)} look like means and variances. {_VARIANCE}"
            )
        super()._check_targets(outputs, targets)

    @property
    def _cure_for_trees(self) -> str:
        return f"{_VARIANCE} {super()._cure_for_trees}"

    def _losses(self, z: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.square(y - z) / 2

    def _variance(self, z: jax.Array) -> jax.Array:
        return jnp.ones_like(z)

    def _draw(self, key: jax.Array, z: jax.Array) -> jax.Array:
        return z + jax.random.normal(key, z.shape, z.dtype)


class Poisson(Elementwise):
    """exp(z) - y z."""

    def _losses(self, z: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.exp(z) - y * z

    def _variance(self, z: jax.Array) -> jax.Array:
        return jnp.exp(z)

    def _draw(self, key: jax.Array, z: jax.Array) -> jax.Array:
        return jax.random.poisson(key, jnp.exp(z)).astype(z.dtype)


_VARIANCE = (
    "A learned variance is no exponential family in its outputs: ∇²ℓ would depend on the target, "
    "and the Gauss-Newton matrix would not be the Fisher matrix. Return the means alone (σ = 1)."
)
