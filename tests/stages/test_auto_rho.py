"""A radius that follows the cosine of two gradients: its rule, kept steps, devices and errors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from sam_problem import PARAMS
from small_problems import assert_trees_close, net_batch, net_loss

import curvax as cx

START, COSINE, RATE = 0.1, 0.8, 2.0


def auto(**options: Any) -> Any:
    return cx.auto_rho(**{"start": START, "cosine": COSINE, "rate": RATE} | options)


def steps_of(tx: Any, count: int = 6, loss: Any = net_loss) -> list[tuple[Any, Any]]:
    """(parameters, diagnostics) after each step."""

    @jax.jit
    def step(params: Any, state: Any, t: Any) -> Any:
        value_fn = cx.Objective(loss, jax.tree.map(lambda x: x + 0.1 * t, net_batch()))
        value, grads = value_fn.value_and_grad(params)
        updates, state = tx.update(grads, state, params, value_fn=value_fn, value=value)
        return optax.apply_updates(params, updates), state

    params, state, found = PARAMS, tx.init(PARAMS), []
    for t in range(count):
        params, state = step(params, state, t)
        found.append((params, cx.diagnostics(state)))
    return found


def expected_radii(figures: list[Any], every: int = 1) -> list[float]:
    radii = [START]
    for t in range(1, len(figures)):
        last = figures[t - 1]
        change = np.exp(RATE * (float(last["cosine"]) - COSINE))
        radii.append(radii[-1] * change if t % every == 0 else radii[-1])
    return radii


@pytest.mark.parametrize("every", [1, 3])
def test_radius_follows_the_cosine_of_the_last_perturbation(every):
    found = steps_of(cx.sam_perturb(auto(), every=every) | optax.sgd(0.1))
    figures = [diagnostics for _, diagnostics in found]
    radii = expected_radii(figures, every)
    np.testing.assert_allclose([f["rho"] for f in figures], radii, rtol=1e-5)
    assert len({round(r, 6) for r in radii}) == -(-len(radii) // every)
    given = jnp.asarray([float(f["rho"]) for f in figures])
    fixed = steps_of(cx.sam_perturb(lambda t: given[t], every=every) | optax.sgd(0.1))
    assert_trees_close(found[-1][0], fixed[-1][0], 1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        lambda params, batch: 0 * net_loss(params, batch),
        lambda params, batch: jnp.nan * net_loss(params, batch),
    ],
    ids=["zero gradient", "NaN"],
)
def test_radius_stays_where_there_is_no_cosine(loss):
    found = steps_of(cx.sam_perturb(auto()) | optax.sgd(0.1), 3, loss)
    assert [float(f["rho"]) for _, f in found] == pytest.approx([START] * 3)


@pytest.mark.parametrize("check", [True, False])
def test_devices_with_perturbations_of_their_own_share_a_radius(check):
    tx = cx.sam_perturb(auto()) | cx.pmean_updates("batch") | optax.sgd(0.1)

    def step(params: Any, state: Any, batch: Any) -> Any:
        value_fn = cx.Objective(net_loss, batch)
        value, grads = value_fn.value_and_grad(params)
        updates, state = tx.update(grads, state, params, value_fn=value_fn, value=value)
        own = cx.diagnostics(state)["rho"]
        return optax.apply_updates(params, updates), state, jnp.asarray(own)[None]

    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    specs: Any = dict(in_specs=(P(), P(), P("batch")), out_specs=(P(), P(), P("batch")))
    run = jax.jit(jax.shard_map(step, mesh=mesh, check_vma=check, **specs))
    params, state, last = PARAMS, tx.init(PARAMS), START
    for _ in range(3):
        before = cx.diagnostics(state) if state[0].step else None
        params, state, radii = run(params, state, net_batch())
        if before is not None:
            last *= np.exp(RATE * (float(before["cosine"]) - COSINE))
        np.testing.assert_allclose(radii, [last] * 4, rtol=1e-5)


def test_methods_take_it():
    for method in (cx.sam(optax.sgd(0.1), auto()), cx.gsam(optax.sgd(0.1), auto(), 0.2)):
        radii = [float(figures["rho"]) for _, figures in steps_of(method, 3)]
        assert radii[0] == pytest.approx(START)
        assert len(set(radii)) == 3


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda: cx.auto_rho(0.0), "would stay 0"),
        (lambda: cx.auto_rho(-1.0), "start"),
        (lambda: cx.auto_rho(cosine=1.5), "cosine"),
        (lambda: cx.auto_rho(rate=-1.0), "rate"),
        (lambda: cx.sam_perturb(cx.auto_rho(), ascent=cx.momentum(0.9)), "ascend along another"),
        (lambda: cx.sam_perturb(cx.auto_rho(), fraction=0.5), "ascend along another"),
    ],
)
def test_what_cannot_be_right_is_refused(make, cause):
    with pytest.raises(ValueError, match=cause):
        make()
