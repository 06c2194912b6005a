"""Schedules that follow other schedules."""

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
    """GSAM's ρ, which falls and rises with the learning rate.

        ρₜ = ρ_min + (ρ_max - ρ_min) (lrₜ - lr_min) / (lr_max - lr_min)

    ρ_max where lr_max = lr_min, and never below 0 (a warm-up that starts under lr_min would give
    a negative ρ). Zhuang et al., GSAM, arXiv:2203.08065, section 5.

    Args:
        lr_schedule: step ↦ the learning rate as applied, base factor included.
        rho_max, rho_min: ρ at lr_max and at lr_min, in the units of the norm.
        lr_max, lr_min: the range of the learning rate.

    Returns:
        A schedule for `sam_perturb(rho=)`.

    Raises:
        ValueError: a negative ρ, or lr_max < lr_min.
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
