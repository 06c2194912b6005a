"""A diagonal, or Kronecker factors, estimated every k steps and kept in between."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Period, ValueFn
from curvax.devices import axes
from curvax.objective import as_objective
from curvax.pipes import estimates
from curvax.pipes.initial import factors_behind, initial, zeros_to_keep
from curvax.pipes.signal import Signal, Stage, containing


class EveryState(NamedTuple):
    step: jax.Array
    """Steps taken, int32 scalar."""
    diagonal: Tree
    """The last estimate, in float32 or wider, shaped like the parameters; or a tuple of Kronecker
    factors. Entries that were not finite have the value of the estimate before, except in the first
    step."""
    inner: optax.OptState
    """The state of the stages inside."""


def every(k: Period, stages: optax.GradientTransformation) -> Stage:
    """Estimates a diagonal every k steps, from the first on, and keeps it in between.

    Kronecker factors are kept in the same way.

    Inside, a smoothing stage averages estimates; behind, it averages once per step:
    `every(5, hutchinson_diag() | ema_rms(b))` against `every(5, hutchinson_diag()) | ema_rms(b)`. A
    step that keeps the diagonal costs one gradient. Under `vmap` both branches run, so nothing is
    saved. Entries that are not finite are passed on in their own step only; what is kept in their
    place is the last finite value. Yao et al., AdaHessian, arXiv:2006.00719, Table 8.

    Args:
        k: number of steps per estimate, a positive int, or a traced one.
        stages: stages that set and smooth a diagonal or factors, and leave the updates unchanged.

    Returns:
        A stage that sets `diagonal`, or `factors`.

    Raises:
        ValueError: k < 1, or a part changes the updates.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, curvax
        >>> loss = lambda w: 0.5 * (w[0] ** 2 + 10 * w[1] ** 2)
        >>> tx = curvax.every(10, curvax.hutchinson_diag()) | curvax.scale_by_power(1.0)
        >>> w = jnp.ones(2)
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> [round(float(x), 3) for x in updates]
        [1.0, 1.0]
    """
    if not isinstance(k, jax.Array):
        checks.check_count("every", k=k)
    inner = estimates.estimating(stages, "every(k, ...)")
    makes_factors = hasattr(inner.init, "factors")

    def init(params: Tree, factors: Any = None) -> EveryState:
        below = initial(inner, params, factors)
        zeros = zeros_to_keep(params, factors_behind(inner, params, factors))
        return EveryState(jnp.zeros((), jnp.int32), zeros, below)

    def rule(
        signal: Signal,
        state: EveryState,
        params: Tree = None,
        *,
        value_fn: ValueFn | None = None,
        **extra: Any,
    ) -> tuple[Signal, EveryState]:
        # A copy of the objective has an empty gradient cache, so that no stage inside replaces the
        # caller's gradient by its own: steps that keep the diagonal need the caller's.
        objective = as_objective(value_fn, "every", params)
        fresh = objective.on(objective.batch)
        structures: list[Any] = []  # of factors, known once `refresh` is traced

        def refresh() -> tuple[Tree, Tree, optax.OptState]:
            given = Signal(
                signal.updates,
                signal.gradient,
                signal.diagonal,
                factors=signal.factors,
                local=signal.local,
            )
            given, below = estimates.estimated(
                inner, given, state.inner, params, "every(k, ...)", value_fn=fresh, **extra
            )
            found = estimates.needed(given, state.diagonal, "every", "keeps a diagonal")
            structures.append(found.structure)
            good = lambda x, old, fine: jnp.where(fine | (state.step == 0), x, old)
            estimate = trees.cast_like(found.tree, state.diagonal)
            kept = jax.tree.map(good, estimate, state.diagonal, found.fine)
            return () if makes_factors else estimate, kept, below

        keep = lambda: (() if makes_factors else state.diagonal, state.diagonal, state.inner)
        shown, kept, below = axes.cond(state.step % k == 0, refresh, keep)
        if not makes_factors:
            return signal._replace(diagonal=shown), EveryState(state.step + 1, kept, below)
        if not structures:  # without `jit`, in a step that keeps
            jax.eval_shape(refresh)
        signal = signal._replace(factors=jax.tree.unflatten(structures[-1], kept))
        return signal, EveryState(state.step + 1, kept, below)

    return containing(init, rule, inner)
