"""GSAM's schedule of ρ: it follows the learning rate."""

import numpy as np
import optax
import pytest

import curvax as cx


def test_rho_schedule_follows_the_learning_rate():
    lr = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 10, 100, 3e-5)
    rho = cx.rho_schedule(lr, 0.6, 0.1, lr_max=3e-3, lr_min=3e-5)
    np.testing.assert_allclose([rho(10), rho(100)], [0.6, 0.1], rtol=1e-6)
    np.testing.assert_allclose(rho(55), 0.1 + 0.5 * (lr(55) - 3e-5) / (3e-3 - 3e-5), rtol=1e-6)
    # Below lr_min the line is followed, down to 0 and no further.
    np.testing.assert_allclose(rho(0), 0.1 - 0.5 * 3e-5 / (3e-3 - 3e-5), rtol=1e-5)
    steep = cx.rho_schedule(lr, 0.6, 0.0, lr_max=3e-3, lr_min=3e-5)
    assert steep(0) == 0


def test_rho_schedule_of_a_constant_learning_rate_is_rho_max():
    rho = cx.rho_schedule(optax.constant_schedule(0.1), 0.6, 0.1, lr_max=0.1, lr_min=0.1)
    assert rho(3) == 0.6


@pytest.mark.parametrize(
    "options", [dict(rho_max=-0.1, rho_min=0.0, lr_max=1.0), dict(rho_max=0.1, rho_min=-1.0,
    lr_max=1.0), dict(rho_max=0.1, rho_min=0.0, lr_max=0.1, lr_min=0.2)],
)  # fmt: skip
def test_rho_schedule_refuses_wrong_ranges(options):
    with pytest.raises(ValueError, match="`rho_schedule` takes rho_max, rho_min >= 0"):
        cx.rho_schedule(optax.constant_schedule(0.1), **options)
