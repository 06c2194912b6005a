"""Levenberg-Marquardt damping: λ adapted by how well the quadratic model predicts the loss."""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Scalar, ValueFn
from curvax.devices.axes import AxisNames
from curvax.objective import Objective, as_objective, device_mean
from curvax.pipes import requirements
from curvax.pipes.diagnostics import Flags, Metrics, metrics_of, no_metrics, with_metrics_of
from curvax.pipes.initial import initial, telling
from curvax.pipes.signal import Signal, Stage, containing, pipe

FACTORS = {"poor": 1.5, "good": 2 / 3, "rejected": 4.0}
"""Factors of λ: for a ratio below ¼, a ratio above ¾, and a rejected step."""

SPAN = 1e10
"""λ stays within this factor of its initial value, and so in the range of float32: λ = 0 or ∞
would stay so."""


class LevenbergMarquardtState(NamedTuple):
    next_damping: jax.Array
    """λ of the next step, a scalar of the default float type."""
    rejected: jax.Array
    """Number of consecutive rejections, int32 scalar."""
    inner: optax.OptState
    """The state of the stages inside."""
    measured: Flags
    figures: Metrics
    """`reduction_ratio` and `kl`."""


def levenberg_marquardt(
    stages: optax.GradientTransformation,
    damping: Scalar = 1.0,
    *,
    reject: bool = True,
    mean_over: AxisNames = None,
) -> Stage:
    """Adapts the λ of `damp()` by the ratio of actual to predicted reduction of the loss.

        ρ = (L(θ + δ) - L(θ)) / (gᵀδ + ½ δᵀCδ),   λ ← 3/2 λ if ρ < ¼,   λ ← 2/3 λ if ρ > ¾

    The stage wraps a pipe with its learning rate, so that δ is the step taken. Loss and model are
    compared on the same batch, at the cost of two forward passes and one product. A step that
    raises the loss is rejected: the updates are 0, λ is multiplied by 4, and the inner state is
    restored, except for its metrics. From the second rejection in a row on, the inner state is
    initialised anew, schedule counts and keys included, since a momentum that points uphill would
    be rejected for ever. λ stays within a factor 10¹⁰ of its initial value. Martens, Hessian-free
    optimization (ICML 2010), section 4.1; arXiv:1412.1193, section 10.

    Args:
        stages: a pipe with `damp()` in it, such as `fisher_matvec() | damp() | solve(cg(20)) |
            optax.scale_by_learning_rate(1.0)`.
        damping: initial λ > 0, in the units of the curvature.
        reject: whether to reject steps that raise the loss (beyond rounding), or give NaN;
            otherwise such steps are taken, and only λ is raised.
        mean_over: device axis, or tuple of axes, to average the losses over.

    Returns:
        A stage that needs `value_fn`. Its metrics are `reduction_ratio` ρ and `kl` ½ δᵀCδ, next to
        the `damping` of `damp`.

    Raises:
        ValueError: λ <= 0; in `update`, the stages set no curvature product.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, curvax
        >>> loss = lambda w: 0.5 * jnp.sum(w**2)
        >>> newton = curvax.hessian_matvec() | curvax.damp() | curvax.solve(curvax.cg(10))
        >>> tx = curvax.levenberg_marquardt(newton | optax.scale_by_learning_rate(1.0), damping=1.0)
        >>> w = jnp.array([3.0, 4.0])
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> round(float(curvax.diagnostics(state)["reduction_ratio"]), 3)  # the loss is quadratic
        1.0
    """
    checks.check_range("damping", damping, 0, jnp.inf, stage="levenberg_marquardt")
    _refuse_zero(damping)
    inner = pipe(stages)

    def init(params: Tree, factors: Any = None) -> LevenbergMarquardtState:
        lam = jnp.array(damping, jnp.result_type(float))
        below, metrics = initial(inner, params, factors), no_metrics("reduction_ratio", "kl")
        return LevenbergMarquardtState(lam, jnp.zeros((), jnp.int32), below, *metrics)

    def rule(
        signal: Signal,
        state: LevenbergMarquardtState,
        params: Tree,
        *,
        value_fn: ValueFn | None = None,
        **extra: Any,
    ) -> tuple[Signal, LevenbergMarquardtState]:
        objective = as_objective(value_fn, "levenberg_marquardt", params)
        local = objective.local_axes(params)
        over = checks.averaged_axes(mean_over, local, stage="levenberg_marquardt")
        extra |= {"value_fn": value_fn, "damping": state.next_damping}
        out, new_inner = inner.update(signal, state.inner, params, **extra)
        checks.refuse_local(out.local, stage="levenberg_marquardt")
        trial = _try(objective, params, out, over)
        undone = trial.rose & reject
        fresh = _select(state.rejected > 0, initial(inner, params, signal.factors), state.inner)
        zeros = jax.tree.map(jnp.zeros_like, out.updates)
        metrics = dict(reduction_ratio=trial.ratio, kl=jnp.where(undone, 0.0, trial.kl))
        new_state = LevenbergMarquardtState(
            _adapted(state.next_damping, trial, damping),
            jnp.where(undone, state.rejected + 1, 0),
            with_metrics_of(_select(undone, fresh, new_inner), new_inner),
            *metrics_of(metrics),
        )
        return out._replace(updates=_select(undone, zeros, out.updates)), new_state

    all_move = lambda params: [True] * len(jax.tree.leaves(params))
    init = telling(init, moves=(all_move, _FROZEN))
    return containing(init, rule, inner, evaluates_loss=True)


_FROZEN = (
    "`levenberg_marquardt` judges a step in which {leaves} move, and a later part of the pipe "
    "keeps them fixed: the damping would follow a loss that is never reached. Leave them out: "
    '`curvax.partition({{"train": stages, "freeze": optax.set_to_zero()}}, labels)`.'
)


class _Trial(NamedTuple):
    """The outcome of a step."""

    ratio: jax.Array
    kl: jax.Array
    rose: jax.Array
    """Whether the loss rose, or is NaN."""
    flat: jax.Array
    """Whether the predicted change is within rounding, so that the ratio has no meaning."""


def _try(objective: Objective, params: Tree, out: Signal, over: tuple[str, ...]) -> _Trial:
    product = requirements.needed_matvec(
        out.matvec, out.factors, "levenberg_marquardt", "judges a quadratic model"
    )
    delta = out.updates
    before = device_mean(objective, params, over)
    change = device_mean(objective, optax.apply_updates(params, delta), over) - before
    kl = 0.5 * product.form(delta)
    model = trees.dot(out.gradient, delta) + kl
    rounding = 8 * jnp.finfo(before.dtype).eps * jnp.abs(before)
    return _Trial(
        ratio=trees.ratio(change, model),
        kl=kl,
        rose=~(change <= rounding),
        flat=jnp.abs(model) <= rounding,
    )


def _adapted(lam: jax.Array, trial: _Trial, start: Scalar) -> jax.Array:
    cases = [trial.rose, trial.flat, trial.ratio < 0.25, trial.ratio > 0.75]
    factor = jnp.select(cases, [FACTORS["rejected"], 1.0, FACTORS["poor"], FACTORS["good"]], 1.0)
    return jnp.clip(lam * factor, start / SPAN, start * SPAN).astype(lam.dtype)


def _refuse_zero(damping: Scalar) -> None:
    if isinstance(damping, numbers.Real) and damping == 0:
        raise ValueError(
            "`levenberg_marquardt` multiplies λ by a factor at each step, so that a `damping` of 0 "
            "stays 0. Pass a positive one, `levenberg_marquardt(stages, 1e-3)`; for no damping, "
            "write `damp(0.0)` without `levenberg_marquardt`."
        )


def _select(predicate: jax.Array, yes: Tree, no: Tree) -> Tree:
    """Leaf by leaf, varying over a device axis wherever either is."""
    return jax.tree.map(lambda a, b: jnp.where(predicate, a, b), yes, no)
