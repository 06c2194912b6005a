"""Schedules of hyperparameters that are functions of other schedules."""

from typing import Any

import jax.numpy as jnp
import optax


def rho_schedule(
    lr_schedule: optax.Schedule,
    rho_max: float,
    rho_min: float,
    *,
    lr_max: float,
    lr_min: float = 0.0,
) -> optax.Schedule:
    """GSAM's schedule of ρ, proportional to the learning rate.

        ρₜ = ρ_min + (ρ_max - ρ_min) (lrₜ - lr_min) / (lr_max - lr_min)

    ρ is ρ_max where lr_max = lr_min, and is cut off at 0 where a warm-up starts below lr_min.
    Zhuang et al., GSAM, arXiv:2203.08065, section 5.

    Args:
        lr_schedule: step ↦ learning rate, base factor included.
        rho_max: ρ at lr_max, >= 0, in the units of the norm.
        rho_min: ρ at lr_min, >= 0.
        lr_max: largest learning rate of the schedule.
        lr_min: smallest learning rate of the schedule.

    Returns:
        A schedule for `sam_perturb(rho=)`.

    Raises:
        ValueError: a ρ is negative, or lr_max < lr_min.

    Examples:
        >>> import optax, curvax
        >>> lr = optax.linear_schedule(1.0, 0.0, 10)
        >>> rho = curvax.rho_schedule(lr, rho_max=0.6, rho_min=0.1, lr_max=1.0)
        >>> [round(float(rho(step)), 2) for step in (0, 5, 10)]
        [0.6, 0.35, 0.1]
    """
    if min(rho_max, rho_min) < 0 or lr_max < lr_min:
        raise ValueError(
            "`rho_schedule` takes rho_max, rho_min >= 0 and lr_max >= lr_min, and got "
            f"rho_max={rho_max}, rho_min={rho_min}, lr_max={lr_max}, lr_min={lr_min}."
        )

    def schedule(count: Any) -> Any:
        if lr_max == lr_min:
            return jnp.asarray(rho_max, jnp.result_type(float))
        share = (lr_schedule(count) - lr_min) / (lr_max - lr_min)
        return jnp.maximum(rho_min + (rho_max - rho_min) * share, 0.0)

    return schedule
