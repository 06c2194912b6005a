"""SAM, GSAM, LookSAM and Entropy-SGD over any base optimiser, each a pipe of a few stages."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import optax

from curvax.arithmetic.typing import Period, ScalarOrSchedule, TreePrefix
from curvax.devices.axes import AxisNames
from curvax.hyperparameters import injectable
from curvax.pipes.signal import Stage, pipe
from curvax.stages import (
    gsam_project,
    keep_orthogonal,
    local_entropy,
    pmean_updates,
    sam_perturb,
)

Method = TypeVar("Method", bound=Callable[..., Stage])


def _with_options_of(factory: Callable[..., Stage]) -> Callable[[Method], Method]:
    """Replaces `**options` in a method's signature by the keyword options of a stage.

    `help` then shows them, and `optax.inject_hyperparams` binds them by name.
    """

    def spell(method: Method) -> Method:
        own = inspect.signature(method)
        kept = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        options = [
            p
            for p in inspect.signature(factory).parameters.values()
            if p.kind is p.KEYWORD_ONLY and p.name not in own.parameters
        ]
        method.__signature__ = own.replace(parameters=kept + options)  # type: ignore[attr-defined]
        return method

    return spell


@injectable
@_with_options_of(sam_perturb)
def sam(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule | TreePrefix = 0.05,
    *,
    mean_over: AxisNames = None,
    **options: Any,
) -> Stage:
    """SAM: steps of a base optimiser with the gradient at a worst-case perturbation.

        sam_perturb(rho) | pmean_updates(mean_over) | base

        ε̂ = ρ g / ‖g‖₂,   u = ∇L(θ + ε̂)

    Foret et al., SAM, arXiv:2010.01412, Algorithm 1. ASAM is `sam(base, 0.5, ascent=asam(0.01))`.

    Args:
        base: an Optax transformation, such as `optax.adamw(1e-3)`. Over `optax.MultiSteps(base, k)`
            each of the k mini-batches is perturbed separately before the mean is taken; a schedule
            of ρ then counts mini-batches.
        rho: ρ >= 0, the radius of the perturbation in the units of the norm: a number, a schedule,
            a tree prefix of the parameters, or `by_path(f)`.
        mean_over: device axis, or tuple of axes, to average the perturbed gradient over. Each
            device perturbs on its own part of the batch (m-sharpness).
        p: norm of the ball, in [1, ∞].
        steps: number of ascent steps.
        step_size: length of the ascent steps after the first; ρ/steps by default.
        projected: whether steps after the first are projected back into the ball.
        ascent: ascent rule, such as `asam(0.01)` or `fisher_ascent()`; a tree prefix of rules or a
            callable `path -> rule` for rules by group. `dual_norm(p)` by default. Along earlier
            gradients, `momentum(0.9)`, a step costs one gradient.
        fraction: fraction of the batch in (0, 1], its first examples, that the ascent gradient is
            computed on; a step costs 1 + fraction gradients.
        second_order: whether to differentiate through ε̂(θ), at one Hessian product per ascent
            step.
        mode: differentiation mode of these products, as in `hvp`.
        every: perturb every k-th step only, from the first on.
        sync_over: device axes to average the ascent gradient over, for one perturbation shared by
            all devices.
        mask: tree prefix of booleans, or a callable `params -> tree`; False leaves stay
            unperturbed.

    Returns:
        A stage. Each `update` needs `value_fn`, and costs two gradients.

    Raises:
        ValueError, TypeError: an option is out of range, or is traced where it must be static.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, curvax
        >>> loss = lambda w: 0.5 * jnp.sum(w**2)
        >>> tx = curvax.sam(optax.sgd(0.1), rho=0.1)
        >>> w = jnp.array([3.0, 4.0])
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> [round(float(x), 3) for x in updates]
        [-0.306, -0.408]
    """
    return pipe(sam_perturb(rho, **options), pmean_updates(mean_over), base)


@injectable
@_with_options_of(sam_perturb)
def gsam(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule | TreePrefix,
    alpha: ScalarOrSchedule,
    *,
    onto: str = "perturbed",
    mean_over: AxisNames = None,
    **options: Any,
) -> Stage:
    """GSAM: SAM that also minimises the surrogate gap h = L(θ + ε̂) - L(θ).

        sam_perturb(rho) | gsam_project(alpha) | pmean_updates(mean_over) | base

        u = g_p - α g_⊥,   g_⊥ = g - <g, ĝ_p> ĝ_p

    Zhuang et al., GSAM, arXiv:2203.08065, Algorithm 1. Perturbation and projection are per device,
    as in the authors' code. `rho_schedule` gives the paper's schedule of ρ.

    Args:
        base: an Optax transformation, such as `optax.adamw(1e-3)`.
        rho: ρ >= 0, the radius of the perturbation in the units of the norm: a number, a schedule,
            a tree prefix of the parameters, or `by_path(f)`.
        alpha: α, the weight of the orthogonal part: a number or a schedule; 0 is SAM.
        onto: "perturbed" keeps g_p and adds the part of g orthogonal to it (the paper); "clean"
            keeps g and adds the part of g_p orthogonal to it.
        mean_over: device axis, or tuple of axes, to average the updates over.
        sync_over: device axes to average the ascent gradient over, for one perturbation shared by
            all devices.
        p: norm of the ball, in [1, ∞].
        steps, step_size, projected: number of ascent steps; length of those after the first,
            ρ/steps by default; whether they are projected back into the ball.
        ascent: ascent rule in place of `dual_norm(p)`, such as `asam(0.01)`; for rules by group, a
            tree prefix of rules or a callable `path -> rule`.
        fraction: fraction of the batch that the ascent gradient is computed on.
        second_order, mode: whether to differentiate through ε̂(θ), at one Hessian product per ascent
            step, and the differentiation mode of these products, as in `hvp`.
        every: perturb every k-th step only, from the first on.
        mask: the leaves to perturb, a tree prefix of booleans or a callable `params -> tree`.

    Returns:
        A stage that needs `value_fn` in each `update`, at the cost of two gradients.

    Raises:
        ValueError, TypeError: an option is out of range, or is traced where it must be static.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, curvax
        >>> loss = lambda w: 0.5 * (w[0] ** 2 + 10 * w[1] ** 2)
        >>> tx = curvax.gsam(optax.sgd(0.1), rho=0.1, alpha=0.5)
        >>> w = jnp.array([3.0, 0.4])
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> [round(float(x), 2) for x in updates]
        [-0.29, -0.49]
    """
    return pipe(
        sam_perturb(rho, **options),
        gsam_project(alpha, onto=onto),
        pmean_updates(mean_over),
        base,
    )


@injectable
@_with_options_of(sam_perturb)
def look_sam(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule | TreePrefix,
    *,
    every: Period = 5,
    alpha: ScalarOrSchedule = 0.7,
    mean_over: AxisNames = None,
    **options: Any,
) -> Stage:
    """LookSAM: SAM every k-th step, with the orthogonal part of its gradient reused in between.

        sam_perturb(rho, every=k) | pmean_updates(mean_over) | keep_orthogonal(alpha) | base

        SAM steps:    u = g_p,   g_v = g_p - <g_p, ĝ> ĝ
        in between:   u = g + α ‖g‖ ĝ_v

    Liu et al., LookSAM, arXiv:2203.02714, Algorithm 1.

    Args:
        base: an Optax transformation, such as `optax.adamw(1e-3)`.
        rho: ρ >= 0, the radius of the perturbation in the units of the norm: a number, a schedule,
            a tree prefix of the parameters, or `by_path(f)`.
        every: k, the number of steps per SAM step; a positive int.
        alpha: α, the length of the reused part as a fraction of ‖g‖: a number or a schedule.
        mean_over: device axis, or tuple of axes, to average the updates over.
        p: norm of the ball, in [1, ∞].
        steps: number of ascent steps.
        step_size: length of the ascent steps after the first; ρ/steps by default.
        projected: whether steps after the first are projected back into the ball.
        ascent: ascent rule, such as `asam(0.01)`; a tree prefix of rules or a callable
            `path -> rule` for rules by group. `dual_norm(p)` by default.
        fraction: fraction of the batch that the ascent gradient is computed on.
        second_order: whether to differentiate through ε̂(θ), at one Hessian product per ascent
            step.
        mode: differentiation mode of these products, as in `hvp`.
        sync_over: device axes to average the ascent gradient over, for one perturbation shared by
            all devices.
        mask: tree prefix of booleans, or a callable `params -> tree`; False leaves stay
            unperturbed.

    Returns:
        A stage. Each `update` needs `value_fn`; the mean cost is 1 + 1/k gradients.

    Raises:
        ValueError, TypeError: an option is out of range, or is traced where it must be static.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, curvax
        >>> loss = lambda w: 0.5 * jnp.sum(w**2)
        >>> tx = curvax.look_sam(optax.sgd(0.1), rho=0.1, every=5)
        >>> w = jnp.array([3.0, 4.0])
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> [round(float(x), 3) for x in updates]  # the first step is one of SAM
        [-0.306, -0.408]
    """
    return pipe(
        sam_perturb(rho, every=every, **options),
        pmean_updates(mean_over),
        keep_orthogonal(alpha),
        base,
    )


@injectable
@_with_options_of(local_entropy)
def entropy_sgd(
    base: optax.GradientTransformation,
    scope: ScalarOrSchedule = 1e-4,
    *,
    mean_over: AxisNames = None,
    **options: Any,
) -> Stage:
    """Entropy-SGD: steps of a base optimiser towards the mean of a Langevin walk around θ.

        local_entropy(scope) | pmean_updates(mean_over) | base

        u = θ - μ,   μ an average over L inner steps of SGD with noise and the pull γ (x - θ)

    Chaudhari et al., Entropy-SGD, arXiv:1611.01838, Algorithm 1, with the defaults of the authors'
    code; how it differs from that code is said at `local_entropy`. The update has the size of L
    steps of SGD: their base on MNIST is `optax.sgd(1.0)`, which moves θ to μ, then `sgd(0.1)`.

    Args:
        base: an Optax transformation, such as `optax.sgd(1.0)` or `optax.adamw(1e-3)`.
        scope: γ >= 0, the force that holds the walk near θ: a number or a schedule, such as
            `optax.exponential_decay(1e-4, 1, 1.001)`, which is the scoping of the authors' code.
        mean_over: device axis, or tuple of axes, to average the updates over. Each device walks on
            its own part of the batch.
        steps: L, the number of inner steps.
        rate: η' >= 0, their learning rate.
        noise: ε >= 0, the size of the noise.
        decay: 1 - α in [0, 1), what an inner step keeps of μ.
        momentum: β in [0, 1), of the gradients of the inner steps.
        split_batch: whether each inner step takes a piece of the batch, for one gradient a step.
        sync_over: device axes to average the inner gradients over, for one walk of all devices.
        sampler: `(key, tree) -> noise`, normal by default; `rademacher` is cheaper.
        key: typed key or seed of the noise.

    Returns:
        A stage. Each `update` needs `value_fn`, and costs L gradients.

    Raises:
        ValueError, TypeError: an option is out of range, or is traced where it must be static.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, curvax
        >>> loss = lambda w: 0.5 * jnp.sum(w**2)
        >>> tx = curvax.entropy_sgd(optax.sgd(1.0), steps=5, noise=0.0)
        >>> w = jnp.array([3.0, 4.0])
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> [round(float(x), 3) for x in updates]
        [-1.801, -2.402]
    """
    return pipe(local_entropy(scope, **options), pmean_updates(mean_over), base)
