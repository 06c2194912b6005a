"""Exponential families: ℓ(z, y) = A(z) - <y, z> + const, with ∇A = E[y] and ∇²A = Cov(y)."""

import abc

import jax
import jax.numpy as jnp

from curvax.arithmetic import safe_math, trees
from curvax.arithmetic.trees import Tree
from curvax.likelihoods.batch_entries import Entry
from curvax.likelihoods.likelihood import Likelihood


def categorical(targets: Entry, *, mask: Entry = None, weights: Entry = None) -> Likelihood:
    """Softmax cross-entropy of logits, averaged over sites.

        ℓ = -Σ_c y_c log p_c,   p = softmax(z),   ∇²ℓ = diag(p) - p pᵀ

    A site is a position that has logits: an image, or every token of a sequence. With
    `Objective(model=predict)` the outputs of `predict` are the logits z, [..., C].

    Args:
        targets: a key of the batch or a callable `batch -> array`. Integer classes in [0, C),
            [...], or rows of probabilities, [..., C] (label smoothing, mixup). A class out of range
            makes the loss NaN unless its site is masked.
        mask: a key or callable for a boolean array, True at sites that count; shaped like the
            sites or their first axes.
        weights: a key or callable for weights w >= 0 of the sites, shaped likewise.

    Returns:
        A likelihood, a callable `loss(outputs, batch) -> scalar`.

    Raises:
        TypeError: when called: the mask is not boolean, or targets are neither integers nor floats.
        ValueError: when called: shapes do not match, or the batch lacks a key.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> loss = curvax.categorical("label", mask="mask")
        >>> batch = {"label": jnp.array([0, 2]), "mask": jnp.array([True, False])}
        >>> round(float(loss(jnp.zeros((2, 4)), batch)), 3)  # log 4
        1.386
    """
    return Categorical(targets, mask, weights)


def bernoulli(targets: Entry, *, mask: Entry = None, weights: Entry = None) -> Likelihood:
    """Sigmoid cross-entropy of logits, summed over the outputs and averaged over sites.

        ℓ = Σ_k -y_k log p_k - (1 - y_k) log(1 - p_k),   p = sigmoid(z),   ∇²ℓ = diag(p (1 - p))

    A site is an example of the leading axis, or, if `mask` or `weights` have more axes, a position
    along those; the loss is summed over the remaining axes of the outputs.

    Args:
        targets: a key of the batch or a callable `batch -> array`; y in [0, 1], shaped exactly like
            the outputs.
        mask: a key or callable for a boolean array, True at sites that count.
        weights: a key or callable for weights w >= 0 of the sites.

    Returns:
        A likelihood, a callable `loss(outputs, batch) -> scalar`.

    Raises:
        TypeError: when called: the mask is not boolean.
        ValueError: when called: shapes do not match, or the batch lacks a key.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> batch = {"y": jnp.array([[0.0, 1.0, 1.0]])}
        >>> round(float(curvax.bernoulli("y")(jnp.zeros((1, 3)), batch)), 3)  # 3 log 2
        2.079
    """
    return Bernoulli(targets, mask, weights)


def gaussian(targets: Entry, *, mask: Entry = None, weights: Entry = None) -> Likelihood:
    """Half the squared error, summed over the outputs and averaged over sites.

        ℓ = ½ ‖y - z‖²,   ∇²ℓ = I

    The negative log-likelihood of a Gaussian of mean z and variance 1, without its constant. A
    learned variance is not supported: ∇²ℓ would depend on the target, and the Gauss-Newton matrix
    would not be the Fisher matrix. Sites are those of `bernoulli`.

    Args:
        targets: a key of the batch or a callable `batch -> array`; real numbers, shaped exactly
            like the outputs.
        mask: a key or callable for a boolean array, True at sites that count.
        weights: a key or callable for weights w >= 0 of the sites.

    Returns:
        A likelihood, a callable `loss(outputs, batch) -> scalar`.

    Raises:
        TypeError: when called: the mask is not boolean, or the outputs are not one floating array.
        ValueError: when called: shapes do not match, as with means and variances for outputs, or
            the batch lacks a key.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> batch = {"y": jnp.array([[1.0], [3.0]])}
        >>> float(curvax.gaussian("y")(jnp.zeros((2, 1)), batch))  # ½ mean(y²)
        2.5
    """
    return Gaussian(targets, mask, weights)


def poisson(targets: Entry, *, mask: Entry = None, weights: Entry = None) -> Likelihood:
    """Poisson loss of log-rates, summed over the outputs and averaged over sites.

        ℓ = Σ_k exp(z_k) - y_k z_k,   ∇²ℓ = diag(exp z)

    The negative log-likelihood of counts y with rates exp(z), without its constant log y!. Sites
    are those of `bernoulli`.

    Args:
        targets: a key of the batch or a callable `batch -> array`; counts y >= 0, in exactly the
            shape of the outputs.
        mask: a key or callable for a boolean array, True at sites that count.
        weights: a key or callable for weights w >= 0 of the sites.

    Returns:
        A likelihood, a callable `loss(outputs, batch) -> scalar`.

    Raises:
        TypeError: when called: the mask is not boolean, or the log-rates are not floating.
        ValueError: when called: counts and log-rates differ in shape, or the batch lacks a key.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> batch = {"y": jnp.array([[2.0], [0.0]])}
        >>> float(curvax.poisson("y")(jnp.zeros((2, 1)), batch))
        1.0
    """
    return Poisson(targets, mask, weights)


class Categorical(Likelihood):
    """Softmax cross-entropy, -Σ y log softmax(z)."""

    def label_shape(self, batch: Tree) -> tuple[int, ...]:
        return self._sites(self._read("targets", batch), 0)

    def _sites(self, targets: jax.Array, ndim: int) -> tuple[int, ...]:
        return targets.shape[:-1] if trees.is_float(targets) else targets.shape

    def _check_targets(self, outputs: tuple[int, ...], targets: jax.Array) -> None:
        if not trees.is_float(targets) and not jnp.issubdtype(targets.dtype, jnp.integer):
            raise TypeError(
                "`categorical` takes targets that are integers (classes) or floats "
                f"(probabilities), and these are {targets.dtype}. For one yes-or-no label use "
                "`bernoulli`; otherwise cast with `.astype(int)`."
            )
        wanted = outputs if trees.is_float(targets) else outputs[:-1]
        if targets.shape != wanted:
            raise ValueError(
                f"`categorical` takes logits [..., C] and targets that are integers [...] or "
                f"probabilities [..., C], and received logits {list(outputs)} and {targets.dtype} "
                f"targets {list(targets.shape)} instead of {list(wanted)}. Classes stored as "
                "floats are cast with `.astype(int)`, a last axis of size one is dropped with "
                "`[..., 0]`."
            )

    def _observed(self, y: jax.Array, z: jax.Array) -> jax.Array:
        if trees.is_float(y):
            return y.astype(z.dtype)
        classes = jnp.arange(z.shape[-1], dtype=y.dtype).reshape(*[1] * (z.ndim - 1), -1)
        known = (y >= 0) & (y < z.shape[-1])
        return jnp.where(known, (y == classes).astype(z.dtype), jnp.nan)

    def _losses(self, z: jax.Array, y: jax.Array) -> jax.Array:
        # A class with target 0 may have a logit of -∞, and 0·(-∞) would be NaN.
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
    """A family of one real number, with independent outputs."""

    def _sites(self, targets: jax.Array, ndim: int) -> tuple[int, ...]:
        return targets.shape[: max(1, ndim)]

    def _check_targets(self, outputs: tuple[int, ...], targets: jax.Array) -> None:
        if targets.shape != outputs:
            raise ValueError(
                f"`{self.name}` takes targets shaped like the outputs, and received outputs "
                f"{list(outputs)} and targets {list(targets.shape)}: broadcasting would pair each "
                "output with several targets. Drop a last axis of size one with `[..., 0]`, or "
                "add it with `[..., None]`."
            )

    def _observed(self, y: jax.Array, z: jax.Array) -> jax.Array:
        return y.astype(z.dtype)

    @abc.abstractmethod
    def _variance(self, z: jax.Array) -> jax.Array:
        """The variance A''(z) of y."""

    def _covariance(self, z: jax.Array, v: jax.Array) -> jax.Array:
        return self._variance(z) * v

    def _root(self, z: jax.Array, e: jax.Array) -> jax.Array:
        return safe_math.root(self._variance(z)) * e

    def _root_transpose(self, z: jax.Array, u: jax.Array) -> jax.Array:
        return self._root(z, u)


class Bernoulli(Elementwise):
    """Sigmoid cross-entropy, -y log p - (1 - y) log(1 - p) with p = sigmoid(z)."""

    def _losses(self, z: jax.Array, y: jax.Array) -> jax.Array:
        return y * jax.nn.softplus(-z) + (1 - y) * jax.nn.softplus(z)

    def _variance(self, z: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)

    def _draw(self, key: jax.Array, z: jax.Array) -> jax.Array:
        return jax.random.bernoulli(key, jax.nn.sigmoid(z)).astype(z.dtype)


class Gaussian(Elementwise):
    """Half the squared error, ½ (y - z)²."""

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
    """Poisson loss of log-rates, exp(z) - y z."""

    def _losses(self, z: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.exp(z) - y * z

    def _variance(self, z: jax.Array) -> jax.Array:
        return jnp.exp(z)

    def _draw(self, key: jax.Array, z: jax.Array) -> jax.Array:
        return jax.random.poisson(key, jnp.exp(z)).astype(z.dtype)


_VARIANCE = (
    "A learned variance is not an exponential family in its outputs: ∇²ℓ would depend on the "
    "target, and the Gauss-Newton matrix would not be the Fisher matrix. Return only the means "
    "(σ = 1)."
)
