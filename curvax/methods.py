"""The papers' methods, each one pipe of stages."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import optax

from curvax import checks, stages
from curvax.axes import AxisNames
from curvax.signal import Stage, pipe
from curvax.stages import (
    ema_rms,
    gsam_project,
    hutchinson_diag,
    keep_orthogonal,
    pmean_updates,
    sam_perturb,
    scale_by_power,
    spatial_average,
)

Method = TypeVar("Method", bound=Callable[..., Stage])


def _with_options_of(factory: Callable[..., Stage]) -> Callable[[Method], Method]:
    """Spells a method's `**options` out as the stage's, for `help` and `inject_hyperparams`."""

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


def adahessian(
    learning_rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.999,
    *,
    eps: Any = 1e-4,
    power: Any = 1.0,
    block: Any = "auto",
    magnitudes: bool = True,
    every: Any = 1,
    probes: int = 1,
    weight_decay: Any = 0.0,
    mask: Any = None,
    key: jax.Array | int = 0,
    mean_over: AxisNames = None,
) -> Stage:
    """AdaHessian: Adam with the Hessian diagonal in the place of the gradient's square.

        hutchinson_diag() | spatial_average() | ema_rms(b2) | optax.ema(b1)
        | scale_by_power(power) | optax.scale_by_learning_rate(learning_rate)

    The defaults are those of the authors' image code, whose learning rate was 0.15. `b2=0`
    removes the Hessian momentum, `block=None` the spatial averaging; weight decay is decoupled,
    and `mask` is its mask as in `optax.adamw`. Each update needs `value_fn`. Yao et al.,
    AdaHessian, arXiv:2006.00719, Algorithm 1. The options are those of the stages.
    """
    checks.check_decay("b1", b1, stage="adahessian")
    diagonal = hutchinson_diag(key, probes=probes, mean_over=mean_over)
    if not (isinstance(every, int) and every == 1):
        diagonal = stages.every(every, diagonal)
    smooth = () if block is None else (spatial_average(block, magnitudes=magnitudes),)
    decay = optax.add_decayed_weights(weight_decay, mask)
    return pipe(
        diagonal,
        *smooth,
        ema_rms(b2),
        pmean_updates(mean_over),
        optax.inject_hyperparams(optax.ema)(b1) if callable(b1) else optax.ema(b1),
        scale_by_power(power, eps=eps),
        decay,
        optax.scale_by_learning_rate(learning_rate),
    )


@_with_options_of(sam_perturb)
def sam(
    base: optax.GradientTransformation,
    rho: Any = 0.05,
    *,
    mean_over: AxisNames = None,
    **options: Any,
) -> Stage:
    """SAM over any base: `sam_perturb(rho) | base`, with the options of `sam_perturb`.

    ASAM is `sam(base, 0.5, ascent=asam(0.01))`. Under a device axis each device perturbs on its
    own part of the batch, and `mean_over` names the axis to average over afterwards. Foret et al.,
    SAM, arXiv:2010.01412, Algorithm 1.
    """
    return pipe(sam_perturb(rho, **options), pmean_updates(mean_over), base)


@_with_options_of(sam_perturb)
def gsam(
    base: optax.GradientTransformation,
    rho: Any,
    alpha: Any,
    *,
    onto: str = "perturbed",
    mean_over: AxisNames = None,
    **options: Any,
) -> Stage:
    """GSAM over any base: `sam_perturb(rho) | gsam_project(alpha) | base`.

    The options are those of `sam_perturb`; perturbation and projection are per device, as in the
    authors' code. ρ follows the learning rate with `rho_like`. Zhuang et al., GSAM,
    arXiv:2203.08065, Algorithm 1.
    """
    return pipe(
        sam_perturb(rho, **options),
        gsam_project(alpha, onto=onto),
        pmean_updates(mean_over),
        base,
    )


@_with_options_of(sam_perturb)
def look_sam(
    base: optax.GradientTransformation,
    rho: Any,
    *,
    every: Any = 5,
    alpha: Any = 0.7,
    mean_over: AxisNames = None,
    **options: Any,
) -> Stage:
    """LookSAM over any base: SAM every k-th step, its orthogonal part reused in between.

        sam_perturb(rho, every=k) | keep_orthogonal(alpha) | base

    The options are those of `sam_perturb`. Liu et al., LookSAM, arXiv:2203.02714, Algorithm 1.
    """
    return pipe(
        sam_perturb(rho, every=every, **options),
        pmean_updates(mean_over),
        keep_orthogonal(alpha),
        base,
    )
