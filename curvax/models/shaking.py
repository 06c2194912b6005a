"""Noise on residual branches that is drawn twice: for the value, and for the derivative.

    y = β x + sg((α - β) x)        value α x, derivative β

`sg` is `stop_gradient`; α and β are numbers for each image. In contrast to a `custom_vjp`, this has
derivatives in forward mode and of higher order, with the same β in all of them.
"""

import jax
import jax.numpy as jnp

from curvax.models.convnets import ConvNet


class ShakenNet(ConvNet, kw_only=True):
    """The options of networks with noise on their branches.

    In training the noise comes from `rngs={"dropout": key}`, and values have other coefficients (α)
    than derivatives (β). At α ≠ β no gradient, Jacobian or Hessian is that of the loss that is
    evaluated. They belong to the loss in which every c = (α - β) x is a constant, with its value at
    the current parameters: products with its Hessian and its Gauss-Newton matrix are symmetric, and
    agree with the gradient of training, but c moves with the parameters. To measure the curvature
    of a trained model, evaluate it at `train=False`, where nothing is drawn, or pass
    `true_gradient=True`.

    Attributes:
        true_gradient: whether β = α. google-research/sam takes SAM's first gradient so, and the
            second one with β ≠ α; here both passes have the same noise and the same rule.
    """

    true_gradient: bool = False


def scaled(x: jax.Array, alpha: jax.Array, beta: jax.Array) -> jax.Array:
    """α x with the derivative β.

    Examples:
        >>> import jax
        >>> from curvax.models.shaking import scaled
        >>> value, slope = jax.value_and_grad(lambda x: scaled(x, 3.0, 5.0))(2.0)
        >>> print(value, slope)
        6.0 5.0
    """
    return beta * x + jax.lax.stop_gradient((alpha - beta) * x)


def shake_shake(key: jax.Array, a: jax.Array, b: jax.Array, *, true_gradient: bool) -> jax.Array:
    """α a + (1 - α) b with the derivatives β and 1 - β, α and β uniform in [0, 1) for each image.

    Gastaldi, arXiv:1705.07485, the variant Shake-Shake-Image.
    """
    alpha, beta = _uniforms(key, a, (0.0, 0.0), true_gradient)
    return b + scaled(a - b, alpha, beta)


def shake_drop(key: jax.Array, branch: jax.Array, keep: float, *, true_gradient: bool) -> jax.Array:
    """(b + α - bα) x with the derivative b + β - bβ, for each image.

    b is 1 with probability `keep`, else 0; α is uniform in [-1, 1), β in [0, 1). The expected value
    is `keep` x. Yamada et al., arXiv:1802.02375, with the ranges of google-research/sam.
    """
    of_kept, of_noise = jax.random.split(key)
    kept = jax.random.bernoulli(of_kept, keep, _per_image(branch))
    noise = _uniforms(of_noise, branch, (-1.0, 0.0), true_gradient)
    alpha, beta = (jnp.where(kept, 1, each).astype(branch.dtype) for each in noise)
    return scaled(branch, alpha, beta)


def _uniforms(
    key: jax.Array, x: jax.Array, least: tuple[float, float], true_gradient: bool
) -> tuple[jax.Array, jax.Array]:
    """α and β for each image, uniform from `least` to 1, or α twice."""
    alpha, beta = (
        jax.random.uniform(of, _per_image(x), minval=low).astype(x.dtype)
        for of, low in zip(jax.random.split(key), least, strict=True)
    )
    return alpha, alpha if true_gradient else beta


def _per_image(x: jax.Array) -> tuple[int, ...]:
    return (x.shape[0],) + (1,) * (x.ndim - 1)
