"""Ascents that need no gradient of the whole batch at θ: along earlier gradients, or of a part."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from sam_problem import PARAMS, WEIGHTS, objective, unravel
from small_problems import flat, net_batch, net_loss, quick_jit

import curvax as cx
from curvax import analysis

RATE, RHO = 0.3, 0.4
SGD = optax.sgd(RATE)


def batch_at(step: int) -> Any:
    return jax.tree.map(lambda x: x + 0.1 * step, net_batch())


def gradient_at(weights: Any, step: int, part: slice = slice(None)) -> Any:
    batch = jax.tree.map(lambda x: x[part], batch_at(step))
    return jax.grad(lambda w: net_loss(unravel(w), batch))(weights)


def trained(tx: Any, steps: int) -> tuple[Any, Any]:
    """(the parameters, the state) after steps on a batch each."""

    @quick_jit
    def step(params: Any, state: Any, t: Any) -> Any:
        value_fn = cx.Objective(net_loss, batch_at(t))
        _, grads = value_fn.value_and_grad(params)
        updates, state = tx.update(grads, state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for t in range(steps):
        params, state = step(params, state, t)
    return params, state


def unit(v: Any) -> Any:
    return v / np.linalg.norm(v) if np.any(v) else v


def by_hand(decay: float, steps: int, scale: Any = lambda w: 1.0, every: int = 1) -> np.ndarray:
    """θ ← θ - η ∇L(θ + ρ T² m/‖T m‖),   m ← β m + (1 - β) u."""
    w, m = WEIGHTS, np.zeros(len(WEIGHTS))
    for t in range(steps):
        moves = t % every == 0
        u = gradient_at(w + RHO * scale(w) * unit(scale(w) * m) if moves else w, t)
        m = decay * m + (1 - decay) * u if moves else m
        w = w - RATE * u
    return np.asarray(w)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_momentum_is_its_loop(decay):
    params, _ = trained(cx.sam_perturb(RHO, ascent=cx.momentum(decay)) | SGD, 4)
    np.testing.assert_allclose(flat(params), by_hand(decay, 4), rtol=1e-10)


def test_momentum_goes_through_another_rule():
    rule = cx.momentum(0.5, cx.asam_all())
    params, _ = trained(cx.sam(SGD, RHO, ascent=rule), 3)
    np.testing.assert_allclose(flat(params), by_hand(0.5, 3, np.abs), rtol=1e-10)


def test_steps_between_perturbations_keep_the_average():
    tx = cx.sam_perturb(RHO, ascent=cx.momentum(0.5), every=2) | SGD
    np.testing.assert_allclose(flat(trained(tx, 5)[0]), by_hand(0.5, 5, every=2), rtol=1e-10)


@pytest.mark.parametrize("options", [dict(ascent=cx.momentum(0.9)), dict(fraction=0.5)])
def test_radius_zero_is_the_base(options):
    """To the last bit."""
    still = cx.sam_perturb(0.0, **options)

    def both(params: Any) -> Any:
        value_fn = objective()
        _, grads = value_fn.value_and_grad(params)
        return still.update(grads, still.init(params), params, value_fn=value_fn)[0], grads

    jax.tree.map(np.testing.assert_array_equal, *quick_jit(both)(PARAMS))


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_fraction_ascends_on_the_first_examples(fraction):
    w = WEIGHTS
    for t in range(3):
        first = gradient_at(w, t, slice(int(fraction * 8)))
        w = w - RATE * gradient_at(w + RHO * unit(first), t)
    params, _ = trained(cx.sam(SGD, RHO, fraction=fraction), 3)
    np.testing.assert_allclose(flat(params), w, rtol=1e-10)


def test_the_whole_fraction_is_sam():
    assert_same = partial(jax.tree.map, np.testing.assert_array_equal)
    assert_same(trained(cx.sam(SGD, RHO, fraction=1.0), 2), trained(cx.sam(SGD, RHO), 2))


def test_groups_take_a_fraction_of_each_and_share_an_average():
    groups = [slice(0, 4), slice(4, 8)]
    of_part = lambda w, s: gradient_at(
        w + RHO * unit(gradient_at(w, 0, slice(s.start, s.start + 2))), 0, s
    )
    expected = WEIGHTS - RATE * np.mean([of_part(WEIGHTS, s) for s in groups], axis=0)
    params, _ = trained(cx.per_group(4, cx.sam_perturb(RHO, fraction=0.5)) | SGD, 1)
    np.testing.assert_allclose(flat(params), expected, rtol=1e-10)

    params, _ = trained(cx.per_group(4, cx.sam_perturb(RHO, ascent=cx.momentum(0.0))) | SGD, 3)
    np.testing.assert_allclose(flat(params), by_hand(0.0, 3), rtol=1e-10)


def test_metrics_and_aux_are_those_of_the_perturbed_pass():
    def loss(params: Any, batch: Any) -> Any:
        value = net_loss(params, batch)
        return value, {"seen": value}

    value_fn = cx.Objective(loss, net_batch(), has_aux=True)
    _, grads = value_fn.value_and_grad(PARAMS)
    stage = cx.sam_perturb(RHO, fraction=0.5)
    signal, state = stage.update(
        cx.Signal(grads, grads, value=jnp.asarray(1.0), aux={"seen": jnp.zeros(())}),
        stage.init(PARAMS), PARAMS, value_fn=value_fn,
    )  # fmt: skip
    assert signal.value is None
    np.testing.assert_allclose(signal.aux["seen"], signal.perturbed_value)
    known = {name for name, x in cx.diagnostics(state).items() if not np.isnan(x)}
    assert known == {
        "perturbed_loss", "cosine", "rho", "gradient_norm", "perturbed_gradient_norm"
    }  # fmt: skip


def test_state_without_momentum_is_that_of_earlier_checkpoints():
    state = cx.sam_perturb(RHO, fraction=0.5).init(PARAMS)
    assert state._fields == ("step", "keys", "measured", "figures")


# Devices


def on_devices(tx: Any, way: str, steps: int = 3, gathered: Any = None) -> Any:
    """The parameters after steps on eight devices with an example each."""

    def step(params: Any, state: Any, batch: Any) -> Any:
        value_fn = cx.Objective(net_loss, batch)
        _, grads = value_fn.value_and_grad(params)
        updates, state = tx.update(grads, state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    if way == "pmap":
        mapped = jax.pmap(step, axis_name="batch")
        shared = lambda tree: jax.tree.map(lambda x: jnp.broadcast_to(x, (8, *jnp.shape(x))), tree)
        params, state = shared(params), shared(state)
        split = lambda batch: jax.tree.map(lambda x: x[:, None], batch)
    else:
        mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
        mapped = quick_jit(
            jax.shard_map(
                step, mesh=mesh, in_specs=(P(), P(), P("batch")), out_specs=P(),
                check_vma=way == "checked",
            )
        )  # fmt: skip
        split = lambda batch: batch
    for t in range(steps):
        params, state = mapped(params, state, split(batch_at(t)))
    return jax.tree.map(lambda x: x[0], params) if way == "pmap" else params


@pytest.mark.parametrize("way", ["pmap", "checked", "unchecked"])
def test_one_average_of_all_devices_is_that_of_one_device(way):
    tx = cx.sam_perturb(RHO, ascent=cx.momentum(0.5), sync_over="batch")
    params = on_devices(tx | cx.pmean_updates("batch") | SGD, way)
    np.testing.assert_allclose(flat(params), by_hand(0.5, 3), rtol=1e-10)


def test_devices_keep_averages_of_their_own_under_pmap():
    w, m = WEIGHTS, np.zeros((8, len(WEIGHTS)))
    for t in range(3):
        u = [gradient_at(w + RHO * unit(m[i]), t, slice(i, i + 1)) for i in range(8)]
        w, m = w - RATE * np.mean(u, axis=0), np.asarray(u)
    tx = cx.sam_perturb(RHO, ascent=cx.momentum(0.0), sync_over=())
    params = on_devices(tx | cx.pmean_updates("batch") | SGD, "pmap")
    np.testing.assert_allclose(flat(params), w, rtol=1e-10)


def test_an_average_of_local_gradients_needs_a_decision():
    tx = cx.sam(SGD, RHO, ascent=cx.momentum(0.9), mean_over="batch")
    with pytest.raises(ValueError, match=r"`sam_perturb`.*`sync_over='batch'`.*`sync_over=\(\)`"):
        on_devices(tx, "checked", 1)


# Errors


@pytest.mark.parametrize(
    ("act", "error", "told"),
    [
        (lambda: cx.momentum(1.0), ValueError, r"`momentum` takes `decay` in \[0, 1\)"),
        (lambda: cx.momentum(0.1, cx.momentum()), TypeError, r"ascent rule such as `asam\(0.01\)`"),
        (lambda: cx.sam_perturb(0.1, fraction=0.0), ValueError, r"`fraction` in \(0, 1\]"),
        (
            lambda: cx.sam_perturb(0.1, fraction=0.5, second_order=True),
            ValueError,
            "Leave one of them out",
        ),
        (
            lambda: analysis.m_sharpness(objective(), PARAMS, 0.1, 4, ascent=cx.momentum()),
            TypeError,
            "gradients of earlier steps.*`ascent=dual_norm",
        ),
    ],
)
def test_wrong_options_are_refused(act, error, told):
    with pytest.raises(error, match=told):
        act()
