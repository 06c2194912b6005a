"""SAM and its kin over any base optimiser, each one pipe."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import optax

from curvax.devices.axes import AxisNames
from curvax.hyperparameters import injectable
from curvax.pipes.signal import Stage, pipe
from curvax.stages import gsam_project, keep_orthogonal, pmean_updates, sam_perturb

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


@injectable
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
    own part of the batch, and `mean_over` names the axis to average over afterwards. Over
    `optax.MultiSteps(base, k)` the gradients of k mini-batches are averaged, each at its own
    perturbed point; a schedule of ρ then counts mini-batches. Foret et al., SAM,
    arXiv:2010.01412, Algorithm 1.
    """
    return pipe(sam_perturb(rho, **options), pmean_updates(mean_over), base)


@injectable
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
    authors' code. ρ follows the learning rate with `rho_schedule`. Zhuang et al., GSAM,
    arXiv:2203.08065, Algorithm 1.
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
