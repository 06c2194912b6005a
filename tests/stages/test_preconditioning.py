"""`scale_by_power` against its formula."""

import jax.numpy as jnp
import numpy as np
import pytest
from diagonals import given_diagonal

import curvax as cx


@pytest.mark.parametrize(
    "options",
    [dict(power=1.0), dict(power=0.5, eps=1e-3), dict(power=0.3, eps=0.1, damping=0.2),
     dict(power=0.0, eps=0.1)],
    ids=str,
)  # fmt: skip
def test_scale_by_power_divides_updates_by_a_power_of_the_diagonal(options):
    d, u = jnp.array([0.5, 2.0, 0.0]), jnp.array([1.0, -2.0, 3.0])
    tx = given_diagonal() | cx.scale_by_power(**options)
    found, _ = tx.update(u, tx.init(u), u, diagonal=d)
    k, eps, damping = options["power"], options.get("eps", 1e-8), options.get("damping", 0.0)
    np.testing.assert_allclose(found, u / ((d + damping) ** k + eps), rtol=1e-12)


def test_scale_by_power_follows_a_schedule_of_powers():
    u = jnp.array([1.0])
    tx = given_diagonal() | cx.scale_by_power(lambda step: 1 / (1 + step), eps=0.0)
    state, found = tx.init(u), []
    for _ in range(2):
        out, state = tx.update(u, state, u, diagonal=jnp.array([4.0]))
        found.append(out[0])
    np.testing.assert_allclose(found, [1 / 4, 1 / 2])


@pytest.mark.parametrize("options", [dict(power=1.1), dict(power=1, eps=-1.0),
                                     dict(power=1, damping=-1.0)])  # fmt: skip
def test_scale_by_power_refuses_options_out_of_range(options):
    with pytest.raises(ValueError, match=r"`scale_by_power` takes"):
        cx.scale_by_power(**options)
