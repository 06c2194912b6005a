"""The conventions of other libraries, written out: steps as loops in NumPy, matrices as Hessians.

docs/coming_from.md compares them with curvax; test_other_libraries.py with the libraries.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from small_problems import flat, quick_jit

# Steps on a loss with a diagonal Hessian, whose estimate by one probe is exact.

PARAMS = {
    "bias": jnp.array([0.4, -1.1]),
    "kernel": jnp.array([[0.7, -0.2, 1.3], [-0.9, 0.5, -1.6]]),
}
SLOPES = {"bias": jnp.array([0.8, -0.5]), "kernel": jnp.array([[1.0, -2.0, 0.3], [-1.5, 0.6, 2.0]])}


def quartic(params: Any) -> jax.Array:
    """Σ cw²/2 + w⁴/4, so that ∇L = cw + w³ and diag ∇²L = c + 3w², of either sign."""
    term = lambda c, w: jnp.sum(c * w**2 / 2 + w**4 / 4)
    return term(SLOPES["bias"], params["bias"]) + term(SLOPES["kernel"], params["kernel"])


def coupled(params: Any) -> jax.Array:
    """A loss with a dense Hessian."""
    return quartic(params) + jnp.sum(jnp.tanh(params["kernel"].T @ params["bias"]))


C, W0 = flat(SLOPES), flat(PARAMS)


def quartic_grad(w: np.ndarray) -> np.ndarray:
    return C * w + w**3


def quartic_diag(w: np.ndarray) -> np.ndarray:
    return C + 3 * w**2


def coupled_grad(w: np.ndarray) -> np.ndarray:
    bias, kernel = w[:2], w[2:].reshape(2, 3)
    slope = 1 - np.tanh(kernel.T @ bias) ** 2
    return quartic_grad(w) + np.concatenate([kernel @ slope, np.outer(bias, slope).ravel()])


def by_adahessian(steps: int, lr: float, *, eps: float, power: float = 1.0) -> list[np.ndarray]:
    """AdaHessian without an average, as a loop."""
    w, m, v, found = W0, 0 * W0, 0 * W0, []
    for t in range(1, steps + 1):
        m = 0.9 * m + 0.1 * quartic_grad(w)
        v = 0.999 * v + 0.001 * quartic_diag(w) ** 2
        scale = np.sqrt(v / (1 - 0.999**t)) ** power + eps
        w = w - lr * m / (1 - 0.9**t) / scale
        found.append(w)
    return found


def by_debiased_sophia(steps: int, lr: float) -> list[np.ndarray]:
    """Sophia-H whose diagonal is used in the step of its refresh, debiased by their number."""
    w, m, v, found = W0, 0 * W0, 0 * W0, []
    for t in range(steps):
        m = 0.965 * m + 0.035 * quartic_grad(w)
        if t % 10 == 0:
            v = 0.99 * v + 0.01 * quartic_diag(w)
        h = v / (1 - 0.99 ** (t // 10 + 1))
        u = m / (1 - 0.965 ** (t + 1)) / np.maximum(0.01 * h, 1e-8)
        w = w - lr * np.clip(u, -1, 1)
        found.append(w)
    return found


def by_adaptive_sam(steps: int, lr: float, rho: float) -> list[np.ndarray]:
    """ASAM with T = |w| everywhere."""
    w, found = W0, []
    for _ in range(steps):
        g = coupled_grad(w)
        e = rho * w**2 * g / (np.linalg.norm(w * g) + 1e-12)
        w = w - lr * coupled_grad(w + e)
        found.append(w)
    return found


def by_look_sam(steps: int, lr: float, rho: float, k: int, alpha: float) -> list[np.ndarray]:
    """LookSAM over one tensor."""
    w, kept, found = W0, 0 * W0, []
    for t in range(steps):
        g = coupled_grad(w)
        if t % k == 0:
            u = coupled_grad(w + rho * g / (np.linalg.norm(g) + 1e-12))
            kept = u - (u @ g) * g / (g @ g)
        else:
            u = g + alpha * np.linalg.norm(g) / (np.linalg.norm(kept) + 1e-8) * kept
        w = w - lr * u
        found.append(w)
    return found


# Matrices of a linear model, whose Gauss-Newton matrix is the Hessian, whatever the loss.

N, T, CLASSES, INPUTS = 6, 3, 5, 4
rng = np.random.default_rng(0)
WEIGHTS = jnp.asarray(rng.normal(size=(INPUTS, CLASSES)))
BATCH = {
    "x": jnp.asarray(rng.normal(size=(N, INPUTS))),
    "y": jnp.asarray(rng.normal(size=(N, CLASSES))),
    "label": jnp.asarray(np.arange(N) % CLASSES),
}
TOKENS = {
    "x": jnp.asarray(rng.normal(size=(N, T, INPUTS))),
    "label": jnp.asarray(np.arange(N * T).reshape(N, T) % CLASSES),
}
STATES = jnp.asarray(rng.normal(size=(8, INPUTS)))


def linear(w: Any, batch: Any) -> jax.Array:
    return batch["x"] @ w


def hessian_of(loss: Any, batch: Any = BATCH) -> np.ndarray:
    """∇² of `loss(outputs, batch)`."""
    found = quick_jit(jax.hessian(lambda w: loss(linear(w, batch), batch)))(WEIGHTS)
    return np.asarray(found).reshape(WEIGHTS.size, WEIGHTS.size)


def each_gradient(loss: Any) -> np.ndarray:
    """∇ of `loss(output, example)` for every example, [N, P]."""
    one = lambda example: jax.grad(lambda w: loss(linear(w, example), example))(WEIGHTS).ravel()
    return np.asarray(jax.vmap(one)(BATCH))


def cross_entropies(outputs: Any, batch: Any) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["label"])


def square(outputs: Any, batch: Any) -> jax.Array:
    return (outputs - batch["y"]) ** 2


def mean_square(outputs: Any, batch: Any) -> jax.Array:
    return jnp.mean(square(outputs, batch))
