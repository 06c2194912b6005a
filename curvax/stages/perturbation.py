"""SAM's stage: the gradient at a worst-case perturbation of the parameters.

ε̂(θ) = argmax_{‖ε‖ <= ρ} L(θ + ε),    u ← ∇L(θ + ε̂(θ))
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.safe_math import root
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import (
    Mask,
    Period,
    Scalar,
    ScalarOrSchedule,
    TreePrefix,
    ValueFn,
)
from curvax.devices import axes
from curvax.devices.axes import AxisNames
from curvax.hyperparameters import injectable
from curvax.objective import Objective, as_objective, first_part, pieces, value_aux_and_grad
from curvax.perturbation import MomentumAscent, dual_norm
from curvax.perturbation.ascent_rules import AscentLike
from curvax.perturbation.ascent_steps import AscentRules, BallAscent, check_ascent
from curvax.perturbation.radius import AutoRho, radius_of
from curvax.pipes import initial, order
from curvax.pipes.diagnostics import Flags, Metrics, StageMetrics, metrics_of, no_metrics
from curvax.pipes.initial import zeros_to_keep
from curvax.pipes.signal import Signal, Stage, at, stage
from curvax.pipes.state_keys import DrawingKey

METRICS = (
    "loss",
    "perturbed_loss",
    "surrogate_gap",
    "sigma_max",
    "cosine",
    "rho",
    "gradient_norm",
    "perturbed_gradient_norm",
)
OF_LOSS = ("loss", "surrogate_gap", "sigma_max")
"""Metrics that need the loss at θ, left out where nothing else does."""


class SamState(NamedTuple):
    step: jax.Array
    """t, int32 scalar."""
    keys: tuple[jax.Array, ...]
    """The data of the keys of random ascent rules, uint32."""
    measured: Flags
    figures: Metrics


class MomentumState(NamedTuple):
    """The state of an ascent along earlier gradients."""

    step: jax.Array
    keys: tuple[jax.Array, ...]
    average: Tree
    """The average of earlier perturbed gradients, in float32 or wider."""
    measured: Flags
    figures: Metrics


@injectable
def sam_perturb(
    rho: ScalarOrSchedule | TreePrefix,
    *,
    p: float = 2,
    steps: int = 1,
    step_size: ScalarOrSchedule | None = None,
    projected: bool = True,
    ascent: AscentLike | None = None,
    fraction: float = 1.0,
    second_order: bool = False,
    mode: str = "auto",
    every: Period = 1,
    sync_over: AxisNames = None,
    mask: Mask | None = None,
) -> Stage:
    """Replaces the gradient by the gradient at the worst-case perturbation in a ball of radius ρ.

        ε̂ = ρ sign(g) |g|^(q-1) / (‖g‖_q^q)^(1/p),   u ← ∇L(θ + ε̂),   1/p + 1/q = 1

    Foret et al., SAM, arXiv:2010.01412, eq. 2 and 3. The ascent uses the updates that reach the
    stage: under pmap or shard_map a local gradient gives a perturbation per device (m-sharpness),
    to be averaged afterwards by `pmean_updates`. Both passes see the same batch and the same
    dropout key. A zero gradient gives ε̂ = 0.

    Args:
        rho: ρ >= 0, in the units of the norm: a number, traced or not, or a schedule; or, for a ρ
            by group under one norm over all leaves, a tree prefix of the parameters or
            `by_path(f)`; `auto_rho()` sets it during training. (A callable whose argument is
            called `path` is taken for `f`.)
        p: norm of the ball, in [1, ∞].
        steps: number of ascent steps. The first has length ρ.
        step_size: length of the ascent steps after the first; ρ/steps by default.
        projected: whether steps after the first are projected back into the ball, radially.
        ascent: ascent rule, such as `asam(0.01)` or `fisher_ascent()`; or, for rules by group, a
            tree prefix of rules or a callable `path -> rule`. `dual_norm(p)` by default.
            `momentum(0.9)` ascends along earlier gradients, and a step costs one gradient.
        fraction: fraction of the batch in (0, 1], its first examples, that the ascent gradient is
            computed on; a step costs 1 + fraction gradients.
        second_order: whether to differentiate through ε̂(θ), which gives the exact gradient of
            θ ↦ L(θ + ε̂(θ)) at the price of one Hessian product per ascent step.
        mode: differentiation mode of these products, as in `hvp`.
        every: perturb every k-th step only, from the first on; other steps keep the clean gradient.
        sync_over: device axes to average the ascent gradient over, for one perturbation shared by
            all devices. With `momentum` the perturbed gradient is averaged, so that the updates are
            averaged too; `()` keeps the average of each device, in a state of its own.
        mask: tree prefix of booleans, or a callable `params -> tree`. False leaves stay unperturbed
            and do not enter the norm. Leaves that later parts keep fixed (`optax.freeze`,
            `optax.set_to_zero`) are perturbed unless the mask is False there; a warning at `init`
            names them.

    Returns:
        A stage that needs `value_fn`. It sets `updates`, `gradient` (the clean one), `value` and
        `perturbed_value`. Its metrics are `loss`, `perturbed_loss`, `surrogate_gap`
        h = L(θ + ε̂) - L(θ), `sigma_max` 2h/ρ², `cosine` between the two gradients, `rho`,
        `gradient_norm` and `perturbed_gradient_norm`, those of gradients over the leaves that the
        mask lets move. With `momentum` or a `fraction` below 1 nothing needs the gradient given to
        `update`, and the compiler removes it unless the caller uses it or its loss. Then `value`,
        `loss`, `surrogate_gap` and `sigma_max` are not set, `gradient_norm` and `cosine` are those
        of the ascent gradient, and `aux` is that of the perturbed pass.

    Raises:
        ValueError, TypeError: an option is out of range, or is traced where it must be static; in
            `update`, the average of `momentum` is local to a device and `sync_over` is missing.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, curvax
        >>> loss = lambda w: 0.5 * jnp.sum(w**2)
        >>> tx = curvax.sam_perturb(rho=0.1) | optax.sgd(1.0)
        >>> w = jnp.array([3.0, 4.0])
        >>> value, grads = jax.value_and_grad(loss)(w)
        >>> updates, state = tx.update(grads, tx.init(w), w, value_fn=loss, value=value)
        >>> [round(float(x), 3) for x in updates]
        [-3.06, -4.08]
        >>> round(float(curvax.diagnostics(state)["surrogate_gap"]), 3)
        0.505
    """
    decay, ascent = _apart(ascent)
    check_ascent("sam_perturb", rho, p, steps, ascent, second_order=second_order, mode=mode)
    checks.check_fraction(fraction, "sam_perturb")
    if not isinstance(every, jax.Array):
        checks.check_count("sam_perturb", every=every)
    ascent = dual_norm(p) if ascent is None else ascent
    rules = partial(AscentRules, ascent, p, mask)
    own = _Perturbation(
        rules, rho, steps, step_size, projected, decay, fraction,
        second_order, mode, every, sync_over,
    )  # fmt: skip
    if own.apart and second_order:
        raise ValueError(
            "`sam_perturb(second_order=True)` differentiates through the gradient of the whole "
            "batch at θ, and `momentum` and a `fraction` below 1 ascend along another. Leave one "
            "of them out."
        )
    if own.apart and isinstance(rho, AutoRho):
        raise ValueError(
            "`sam_perturb(auto_rho())` compares the gradient at θ with the perturbed one, and "
            "`momentum` and a `fraction` below 1 ascend along another. Give a number or a schedule."
        )
    init = initial.telling(own.init, moves=(lambda params: rules(params).mask, _FROZEN))
    return stage(init, own.rule, name="sam_perturb", replaces_gradient=True)


def _apart(ascent: AscentLike | None) -> tuple[ScalarOrSchedule | None, AscentLike | None]:
    """(the decay of `momentum` or None, the rule)"""
    return (ascent.decay, ascent.rule) if isinstance(ascent, MomentumAscent) else (None, ascent)


class _Perturbation(NamedTuple):
    """The options of `sam_perturb`."""

    rules: Callable[[Tree], AscentRules]
    rho: ScalarOrSchedule | TreePrefix
    steps: int
    step_size: ScalarOrSchedule | None
    projected: bool
    decay: ScalarOrSchedule | None
    """Of `momentum`."""
    fraction: float
    second_order: bool
    mode: str
    every: Period
    sync_over: AxisNames

    @property
    def apart(self) -> bool:
        """Whether the ascent takes another gradient than the given one."""
        return self.decay is not None or self.fraction < 1

    def init(self, params: Tree) -> SamState | MomentumState:
        trees.require_floating(params, "sam_perturb")
        _warn_of_half_precision(params)
        step, rules = jnp.zeros((), jnp.int32), self.rules(params)
        keys = tuple(DrawingKey(key).initial() for key in rules.keys)
        metrics = no_metrics(*(x for x in METRICS if not (self.apart and x in OF_LOSS)))
        if self.decay is None:
            return SamState(step, keys, *metrics)
        return MomentumState(step, keys, zeros_to_keep(params), *metrics)

    def rule(
        self,
        signal: Signal,
        state: SamState | MomentumState,
        params: Tree,
        *,
        value_fn: ValueFn | None = None,
        **extra: Any,
    ) -> tuple[Signal, SamState | MomentumState]:
        del extra
        objective = as_objective(value_fn, "sam_perturb", params)
        ball = self._ball(signal, state, objective, params)
        local = ball.local
        now: jax.Array | bool = True
        if signal.value is not None:
            signal = signal._replace(value=axes.vary(jnp.asarray(signal.value, float), local))
        step = _Step(ball, signal, state, self)
        if isinstance(self.every, int) and self.every == 1:
            found = step.perturbed()
        else:
            now = state.step % self.every == 0
            found = axes.cond(now, step.perturbed, step.clean)
        signal = signal._replace(
            updates=found.updates, gradient=signal.updates, perturbed_value=found.value,
            perturbed=now, local=local,
        )  # fmt: skip
        if self.apart:
            signal = signal._replace(value=None, aux=found.aux)
        new: dict[str, Any] = found.metrics._asdict() | {"step": state.step + 1}
        if self.decay is not None:
            new["average"] = found.average
            shared = frozenset(ball.sync)
            signal = signal._replace(local=local - shared, averaged=signal.averaged | shared)
        return signal, state._replace(**new)

    def _ball(
        self,
        signal: Signal,
        state: SamState | MomentumState,
        objective: Objective,
        params: Tree,
    ) -> BallAscent:
        """The ascent of this step.

        Raises:
            ValueError, TypeError: the gradient, the radius or the device axes do not suit it.
        """
        local = order.local_axes_of_gradient(signal, objective, params, "sam_perturb")
        rho = self.rho
        if isinstance(rho, AutoRho):
            rho = rho.after(state.step, state.figures)
        radius = radius_of(rho, state.step, params, stage="sam_perturb")
        sync = axes.bound(self.sync_over, where="`sam_perturb(sync_over=)`")
        if self.decay is not None:
            checks.averaged_axes(self.sync_over, local, stage="sam_perturb", option="sync_over")
        rules = self.rules(params)
        keys = tuple(DrawingKey(key).of(data) for key, data in zip(rules.keys, state.keys))
        return BallAscent(
            objective=objective,
            params=axes.vary(params, local),
            rules=rules,
            keys=_drawn(keys, state.step, objective, local - set(sync)),
            radius=radius,
            steps=self.steps,
            step_size=at(self.step_size, state.step),
            projected=self.projected,
            sync=sync,
            local=local,
            mode=self.mode,
            shared=self.decay is not None,
        )


_FROZEN = (
    "`sam_perturb` perturbs parameters that a later part of the pipe keeps fixed: {leaves}. They "
    "enter the norm of the gradient, and the loss is evaluated at their perturbed values. Exclude "
    "them by a mask that is False there: `sam_perturb(rho, mask=mask)`, "
    "`sam(base, rho, mask=mask)`."
)


class _Found(NamedTuple):
    """What a step gives, perturbed or not."""

    updates: Tree
    value: jax.Array
    """The loss at the perturbed point."""
    aux: Any
    average: Tree
    """That of `momentum`, () without."""
    metrics: StageMetrics


class _Step(NamedTuple):
    """A step at hand, which perturbs or not."""

    ball: BallAscent
    signal: Signal
    state: SamState | MomentumState
    options: _Perturbation

    def perturbed(self) -> _Found:
        ball, state, decay = self.ball, self.state, self.options.decay
        start = self._ascent_gradient()
        ((value, aux), g_p), updates = ball.gradient(start, self.options.second_order)
        average = ()
        if decay is not None:
            updates = g_p = self._mean(g_p)
            average = _faded(at(decay, state.step), start, g_p)
        both = ball.rules.perturbed(start), ball.rules.perturbed(g_p)
        scalars = _scalars(self.signal.value, value, *both, _largest(ball.radius))
        over = tuple(axis for axis in axes.manual() if axis in ball.local)
        known = {name: scalars[name] for name in state.figures}
        metrics = metrics_of(known, over, ball.objective.batch_weight())
        return _Found(self._typed(updates), value.astype(float), aux, average, metrics)

    def clean(self) -> _Found:
        """The gradient at θ, in a pass of its own if nothing else needs the given one."""
        ball, state, aux, gradient = self.ball, self.state, self.signal.aux, self.signal.updates
        if self.options.apart:
            (_, aux), gradient = value_aux_and_grad(ball.objective, ball.params)
            gradient = self._typed(self._mean(gradient))
        last = axes.vary(state.figures["perturbed_loss"].astype(float), ball.local)
        metrics = StageMetrics(state.measured, state.figures)
        return _Found(gradient, last, aux, getattr(state, "average", ()), metrics)

    def _ascent_gradient(self) -> Tree:
        """An average, the gradient of a part of the batch, or the given one."""
        if isinstance(self.state, MomentumState):
            return self.state.average
        if self.options.fraction == 1:
            return self.signal.updates
        part = first_part(self.ball.objective, self.options.fraction, "sam_perturb")
        return value_aux_and_grad(part, self.ball.params)[1]

    def _mean(self, gradient: Tree) -> Tree:
        """With `momentum` averaged over devices."""
        over = () if self.options.decay is None else self.ball.sync
        return axes.mean(gradient, over, self.ball.objective.batch_weight())

    def _typed(self, updates: Tree) -> Tree:
        return trees.cast_like(updates, self.signal.updates)


def _faded(decay: Scalar, average: Tree, new: Tree) -> Tree:
    """β m + (1 - β) u, and m where u is not finite."""
    fade = lambda m, u: jnp.where(jnp.isfinite(u), decay * m + (1 - decay) * u, m).astype(m.dtype)
    return jax.tree.map(fade, average, trees.wide(new))


def _drawn(
    keys: tuple[jax.Array, ...], step: jax.Array, objective: Objective, local: frozenset[str]
) -> tuple[jax.Array, ...]:
    """The keys of this step for this device's part of the global batch, by its place on `local`."""
    shard, _ = pieces.shard_number(objective, local)
    fold = jax.random.fold_in
    return tuple(fold(fold(key, step), shard) for key in keys)


def _largest(radius: Tree) -> jax.Array:
    leaves = [jnp.asarray(r, float) for r in jax.tree.leaves(radius)]
    return jnp.max(jnp.stack(leaves)) if leaves else jnp.zeros(())


def _warn_of_half_precision(params: Tree) -> None:
    if any(jnp.finfo(x.dtype).bits < 32 for x in jax.tree.leaves(params)):
        warnings.warn(
            "`sam_perturb` on parameters in half precision: a perturbation smaller than their "
            "resolution is lost (ρ = 0.05 over a million weights of size 0.02 moves half of "
            "them). Keep the parameters in float32 and cast them inside the model.",
            stacklevel=2,
        )


def _scalars(
    value: jax.Array | None, value_p: jax.Array, g: Tree, g_p: Tree, rho: jax.Array
) -> dict[str, jax.Array | None]:
    # The perturbed gradient in units near ‖g‖, so that no square overflows or underflows.
    norm, near_one = trees.norm_and_scale(g)
    perturbed = trees.scale(near_one, trees.wide(g_p))
    norm_p = root(trees.dot(perturbed, perturbed))
    gap = None if value is None else value_p - value
    return dict(
        loss=value,
        perturbed_loss=value_p,
        surrogate_gap=gap,
        sigma_max=None if gap is None else trees.ratio(trees.ratio(2 * gap, rho), rho),
        cosine=trees.ratio(trees.ratio(trees.dot(g, perturbed), norm), norm_p),
        rho=rho,
        gradient_norm=norm,
        perturbed_gradient_norm=norm_p / near_one,
    )
