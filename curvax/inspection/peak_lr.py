"""The peak learning rate of an optimiser, on which eigenvalues depend."""

import jax
import jax.numpy as jnp
import optax

from curvax.pipes.parts import options_of, parts_of


def peak_rate(optimizer: optax.GradientTransformation, steps: int) -> float | None:
    """The largest learning rate, over a run, of the last part of a pipe that has one.

        peak_rate(recipe.parse("sam_perturb(0.1) | adamw(cosine(1e-3))", steps=100), 100)  # 0.001

    Args:
        optimizer: a pipe made by `recipe.parse`, which records the options of its parts.
        steps: length of the run.

    Returns:
        None if no part has an argument `learning_rate`.
    """
    for part in reversed(parts_of(optimizer)):
        rate = options_of(part).get("learning_rate")
        if rate is not None:
            return float(jnp.max(jax.vmap(rate)(jnp.arange(steps))) if callable(rate) else rate)
    return None
