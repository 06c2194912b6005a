"""The radius ρ of a perturbation: one for all leaves, or one for each."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Path, Tree


class ByPath:
    """A value for each leaf of the parameters, by its path; `by_path` makes it."""

    def __init__(self, f: Callable[[Path], Any]):
        self.f = f


def by_path(f: Callable[[Path], Any]) -> ByPath:
    """Gives each leaf of the parameters a radius of its own, by its path.

    Args:
        f: `path -> ρ`, a number or a schedule; the path is a tuple of names from the root, such as
            `("Dense_0", "kernel")`.

    Returns:
        A `rho=` of `sam_perturb`, `sam`, `gsam` and `look_sam`. One norm is taken over all leaves.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, curvax
        >>> loss = lambda p: 0.5 * (p["w"] ** 2 + p["b"] ** 2)
        >>> rho = curvax.by_path(lambda path: 0.0 if path[-1] == "b" else 0.1)
        >>> tx = curvax.sam(optax.sgd(1.0), rho)
        >>> p = {"w": jnp.array(3.0), "b": jnp.array(4.0)}
        >>> updates, state = tx.update(jax.grad(loss)(p), tx.init(p), p, value_fn=loss)
        >>> {name: round(float(u), 3) for name, u in updates.items()}
        {'b': -4.0, 'w': -3.06}
    """
    return ByPath(f)


class AutoRho:
    """A radius that follows a target for the cosine of two gradients; `auto_rho` makes it."""

    def __init__(self, start: float, cosine: float, rate: float):
        self.start, self.cosine, self.rate = start, cosine, rate

    def after(self, step: jax.Array, figures: Mapping[str, jax.Array]) -> jax.Array:
        """ρ of a step, from the metrics of the last perturbation."""
        change = jnp.exp(self.rate * (figures["cosine"] - self.cosine))
        seen = jnp.isfinite(change) & (figures["gradient_norm"] > 0)
        following = figures["rho"] * jnp.where(seen, change, 1)
        return jnp.where(step == 0, self.start, following).astype(figures["rho"].dtype)


def auto_rho(start: float = 0.05, *, cosine: float = 0.85, rate: float = 0.5) -> AutoRho:
    """Sets ρ by the cosine between the gradient and the perturbed gradient.

        ρ ← ρ exp(η (cos(∇L(θ), ∇L(θ + ε̂)) - c))

    The cosine falls with ρ: near 1 the second gradient tells little that the first does not, and
    near 0 it is that of another place. ρ grows where the cosine is above c and shrinks where it is
    below. On three networks the best ρ of a sweep, 0.2 to 0.4, had a cosine of 0.83 to 0.91 in the
    middle of training (tests/evidence/auto_rho.md).

    Args:
        start: ρ > 0 of the first step.
        cosine: c in (0, 1), the target.
        rate: η > 0, the change of log ρ in a step per unit of the cosine.

    Returns:
        A `rho=` of `sam_perturb`, `sam`, `gsam` and `look_sam`, whose metric `rho` tells its
        value; not with `momentum` or a `fraction` below 1, whose ascent gradient is another.

    Raises:
        ValueError: a number is out of range.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, curvax
        >>> loss = lambda w: w[0] ** 2 + 10 * w[1] ** 2
        >>> tx = curvax.sam(optax.sgd(0.0), curvax.auto_rho(0.05))
        >>> w = jnp.array([1.0, 0.1])
        >>> state = tx.init(w)
        >>> for _ in range(200):
        ...     value, grads = jax.value_and_grad(loss)(w)
        ...     _, state = tx.update(grads, state, w, value_fn=loss, value=value)
        >>> found = curvax.diagnostics(state)
        >>> round(float(found["rho"]), 2), round(float(found["cosine"]), 2)
        (0.8, 0.85)
    """
    for name, value, low, high in (
        ("start", start, 0, jnp.inf),
        ("cosine", cosine, 0, 1),
        ("rate", rate, 0, jnp.inf),
    ):
        checks.check_range(name, value, low, high, stage="auto_rho")
    if start == 0:
        raise ValueError(
            "`auto_rho(start)` multiplies ρ from step to step, and a start of 0 would stay 0. Give "
            "a small radius, such as 0.05."
        )
    return AutoRho(start, cosine, rate)


def radius_of(rho: Any, step: jax.Array, params: Tree, *, stage: str) -> Tree:
    """ρ for each leaf of the parameters at a step.

    A callable is a schedule `step -> ρ`, or a function of the path if its argument is called so.

    Raises:
        ValueError: ρ is negative, or neither a number nor a tree prefix of the parameters.
    """
    f = rho.f if isinstance(rho, ByPath) else rho
    if isinstance(rho, ByPath) or (callable(rho) and _takes_a_path(rho)):
        spread = trees.map_with_path(lambda path, x: _called(f, path, stage), params)
    else:
        prefix = _called(rho, step, stage) if callable(rho) else rho
        spread = trees.broadcast_prefix(prefix, params)
    spread = jax.tree.map(lambda r: _called(r, step, stage) if callable(r) else r, spread)
    for value in jax.tree.leaves(spread):
        checks.check_range("rho", value, 0, jnp.inf, stage=stage)
    return spread


def _called(f: Callable[..., Any], argument: Any, stage: str) -> Any:
    try:
        return f(argument)
    except Exception as error:
        what = "path" if isinstance(argument, tuple) else "step"
        raise ValueError(
            f"`{stage}(rho=)` takes a schedule `step -> ρ`, or `curvax.by_path(f)` with a function "
            f"`path -> ρ` of the names of a leaf from the root; this one was called with the "
            f"{what} {argument!r} and raised {error!r}."
        ) from error


def _takes_a_path(f: Callable[..., Any]) -> bool:
    try:
        return next(iter(inspect.signature(f).parameters), None) == "path"
    except ValueError:  # builtins without a signature
        return False
