"""Small symmetric systems on trees, and conjugate gradients as a textbook writes them."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SIZE = 12


def tree_of(vector: Any) -> dict[str, Any]:
    """Twelve numbers as a tree with a matrix, a vector and nothing."""
    return {"kernel": vector[4:].reshape(4, 2), "bias": vector[:4], "none": None}


def vector_of(tree: Any) -> Any:
    return jnp.concatenate([tree["bias"], tree["kernel"].ravel()])


def product_of(matrix: Any) -> Callable[[Any], Any]:
    """v ↦ A v on such trees."""
    return lambda v: tree_of(jnp.asarray(matrix) @ vector_of(v))


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def definite(seed: int = 0, floor: float = 0.1) -> np.ndarray:
    """A positive definite matrix whose eigenvalues lie between `floor` and about 3."""
    root = numbers(seed, SIZE, SIZE)
    return root @ root.T / SIZE + floor * np.eye(SIZE)


def indefinite(seed: int = 0) -> np.ndarray:
    return definite(seed) - 0.6 * np.eye(SIZE)


class Textbook(NamedTuple):
    """One iterate."""

    x: np.ndarray
    residual: float
    """‖b - A x‖ / ‖b‖, from the definition."""
    model: float
    """½ xᵀA x - bᵀx, from the definition."""


def textbook_cg(matrix: Any, b: Any, x: Any = 0.0, m: Any = None) -> Iterator[Textbook]:
    """The iterates of preconditioned conjugate gradients from x, M a matrix; x itself first."""
    x = np.zeros_like(b) + x
    m = np.eye(len(b)) if m is None else m
    r = b - matrix @ x
    z = np.linalg.solve(m, r)
    p = z
    while True:
        rest = float(np.linalg.norm(b - matrix @ x) / np.linalg.norm(b))
        yield Textbook(x, rest, 0.5 * x @ matrix @ x - b @ x)
        alpha = r @ z / (p @ matrix @ p)
        x, previous, r = x + alpha * p, r @ z, r - alpha * matrix @ p
        z = np.linalg.solve(m, r)
        p = z + r @ z / previous * p


def textbook_iterates(count: int, *system: Any, **options: Any) -> list[Textbook]:
    return [iterate for iterate, _ in zip(textbook_cg(*system, **options), range(count + 1))]


def relative_residual(matrix: Any, x: Any, b: Any) -> float:
    return float(np.linalg.norm(b - matrix @ np.asarray(vector_of(x))) / np.linalg.norm(b))


def assert_solves(x: Any, expected: Any, tol: float) -> None:
    """A tree against a vector, relative to the length of the vector."""
    wanted = np.asarray(expected)
    error = np.linalg.norm(np.asarray(vector_of(x)) - wanted)
    assert error <= tol * np.linalg.norm(wanted)


def jitted(solver: Any, matrix: Any, b: Any, **options: Any) -> Any:
    """The solution for a vector b, with its tree."""
    return jax.jit(lambda b: solver(product_of(matrix), b, **options))(tree_of(jnp.asarray(b)))
