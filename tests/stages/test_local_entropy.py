"""The local entropy: its walk written out, special cases, pieces of the batch, devices, errors."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from sam_problem import PARAMS, WEIGHTS, unravel
from small_problems import flat, net_batch, net_loss, quick_jit

import curvax as cx
from curvax.planning import collectives, hlo

RATE, DECAY, MOMENTUM = 0.1, 0.25, 0.9
WRONG: Any = "normal"
EXACT: dict[str, Any] = dict(rtol=1e-12, atol=1e-12)
OVER_DEVICES: dict[str, Any] = dict(rtol=1e-10, atol=1e-12)


def scoping(step: Any) -> Any:
    """γ₀ (1 + γ₁)ᵗ"""
    return 0.3 * 1.5**step


gradient = quick_jit(jax.grad(lambda w, batch: net_loss(unravel(w), batch)))


def draws(seed: int, t: int, number: int) -> np.ndarray:
    """The noise of an inner step: a key for each step, inner step and leaf."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), t), number)
    leaves = jax.tree.leaves(PARAMS)
    keys = jax.random.split(key, len(leaves))
    return np.concatenate(
        [jax.random.normal(k, x.shape, x.dtype).ravel() for k, x in zip(keys, leaves)]
    )


def walked(
    w: Any,
    gradients: Any,
    scope: float,
    *,
    momentum: float = 0.0,
    decay: float = DECAY,
    noise: float = 0.0,
    drawn: Any = None,
) -> np.ndarray:
    """θ - μ after an inner step for each function of `gradients`."""
    w = np.asarray(w)
    x, mean, v = w.copy(), w.copy(), np.zeros_like(w)
    for number, of in enumerate(gradients):
        g = np.asarray(of(x))
        v = momentum * v + g
        x = x - RATE * (g + momentum * v + scope * (x - w))
        x = x + np.sqrt(RATE) * noise * drawn(number) if noise else x
        mean = decay * mean + (1 - decay) * x
    return w - mean


def trained(tx: Any, steps: int, objective_of: Any = None) -> tuple[Any, Any]:
    """(the parameters, the state) after steps on a batch each."""
    objective_of = objective_of or (lambda batch: cx.Objective(net_loss, batch))

    @quick_jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        value_fn = objective_of(batch)
        _, grads = value_fn.value_and_grad(params)
        updates, state = tx.update(grads, state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for t in range(steps):
        params, state = step(params, state, batch_at(t))
    return params, state


def batch_at(step: int, n: int = 8) -> Any:
    return jax.tree.map(lambda x: x + 0.1 * step, net_batch(n))


def first_updates(tx: Any, value_fn: Any, params: Any = PARAMS) -> Any:
    _, grads = value_fn.value_and_grad(params)
    return tx.update(grads, tx.init(params), params, value_fn=value_fn)[0]


def test_local_entropy_is_algorithm_1():
    """With the paper's α of 0.75 and a scope that grows."""
    tx = cx.local_entropy(scoping, steps=4, noise=0.05, decay=0.25, momentum=0.0, key=7)
    found, state = trained(tx | optax.sgd(0.8), 5)
    w = WEIGHTS
    for t in range(5):
        of = [partial(gradient, batch=batch_at(t))] * 4
        away = walked(w, of, scoping(t), noise=0.05, drawn=partial(draws, 7, t))
        w = w - 0.8 * away
    np.testing.assert_allclose(flat(found), w, **EXACT)
    metrics = cx.diagnostics(state)
    np.testing.assert_allclose(metrics["distance"], np.linalg.norm(away), rtol=1e-6)
    np.testing.assert_allclose(metrics["scope"], scoping(4), rtol=1e-6)


def by_the_authors(steps: int, inner: int, lr: float, g0: float, eps: float, wd: float) -> Any:
    """Their Python code, on one batch for the inner gradients: Nesterov's momentum in both loops,
    weight decay among the inner gradients, and an outer momentum that starts at 0.
    """
    w, outer = np.asarray(WEIGHTS), np.zeros(len(WEIGHTS))
    for t in range(steps):
        x, mw, mdw = w.copy(), w.copy(), np.zeros_like(w)
        for number in range(inner):
            dw = gradient(x, batch_at(t)) + wd * x
            mdw = 0.9 * mdw + dw
            dw = dw + 0.9 * mdw - g0 * (w - x)
            x = x - 0.1 * (dw - eps / np.sqrt(0.5 * 0.1) * draws(0, t, number))
            mw = 0.75 * mw + 0.25 * x
        dw = w - mw
        outer = 0.9 * outer + dw
        w = w - lr * (dw + 0.9 * outer)
    return w


def test_entropy_sgd_is_the_authors_code_at_their_noise_and_weight_decay():
    decayed = lambda params, batch: net_loss(params, batch) + 0.05 * jnp.sum(flat_(params) ** 2)
    base = optax.sgd(0.05, momentum=0.9, nesterov=True)
    tx = cx.entropy_sgd(base, 0.03, steps=3, noise=np.sqrt(2) * 0.02)
    found, _ = trained(tx, 4, lambda batch: cx.Objective(decayed, batch))
    expected = by_the_authors(4, 3, lr=0.05, g0=0.03, eps=0.02, wd=0.1)
    np.testing.assert_allclose(flat(found), expected, **EXACT)


def flat_(params: Any) -> jax.Array:
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(params)])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_without_scope_noise_and_average_a_step_is_l_steps_of_sgd(momentum):
    options: Any = dict(steps=5, rate=RATE, noise=0.0, decay=0.0, momentum=momentum)
    found, _ = trained(cx.entropy_sgd(optax.sgd(1.0), 0.0, **options), 1)
    value_fn = cx.Objective(net_loss, batch_at(0))
    sgd, params = optax.sgd(RATE, momentum=momentum or None, nesterov=bool(momentum)), PARAMS
    state = sgd.init(params)
    for _ in range(5):
        updates, state = sgd.update(value_fn.value_and_grad(params)[1], state)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(flat(found), flat(params), **EXACT)


@pytest.mark.parametrize("scope", [0.0, 3.0])
def test_one_inner_step_is_a_multiple_of_the_gradient_and_evaluates_no_loss(scope):
    def never(params: Any) -> Any:
        raise AssertionError("the loss was evaluated")

    tx = cx.local_entropy(scope, steps=1, rate=RATE, noise=0.0, decay=DECAY, momentum=MOMENTUM)
    grads = unravel(gradient(WEIGHTS, batch_at(0)))
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=never)
    factor = (1 - DECAY) * (1 + MOMENTUM) * RATE
    np.testing.assert_allclose(flat(updates), factor * flat(grads), **EXACT)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_a_long_walk_has_the_gradient_of_the_local_entropy_of_a_quadratic(momentum):
    """-F(θ; γ) = ½ θᵀ γ H (H + γ I)⁻¹ θ + c of L = ½ θᵀ H θ, at the scope (1 - β) γ."""
    root = np.asarray(jax.random.normal(jax.random.key(3), (4, 4)))
    hessian, gamma, theta = root @ root.T, 0.7, jnp.arange(1.0, 5.0)
    scope = gamma / (1 - momentum)
    value_fn = cx.Objective(lambda w: 0.5 * w @ hessian @ w)
    stage = cx.local_entropy(scope, steps=800, rate=0.03, noise=0.0, momentum=momentum)
    tx = stage | optax.scale_by_schedule(lambda step: gamma)
    found = quick_jit(lambda w: first_updates(tx, value_fn, w))(theta)
    expected = gamma * hessian @ np.linalg.solve(hessian + gamma * np.eye(4), theta)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("sampler", [cx.gaussian_probe, cx.rademacher])
def test_noise_has_the_size_of_algorithm_1_and_changes_from_step_to_step(sampler):
    """√η' ε in each inner step, independent of the others."""
    params = jnp.zeros(20_000)
    options: Any = dict(decay=0.0, momentum=0.0, sampler=sampler)
    tx = cx.local_entropy(0.0, steps=3, rate=0.04, noise=0.5, **options)

    @jax.jit
    def step(state: Any) -> Any:
        value_fn = cx.Objective(lambda w: 0.0 * jnp.sum(w))
        return tx.update(params, state, params, value_fn=value_fn)

    first, state = step(tx.init(params))
    second, _ = step(state)
    for updates in (first, second):
        # Over 20 000 draws a standard deviation has a relative error of 0.5 %.
        np.testing.assert_allclose(np.std(updates), np.sqrt(3 * 0.04) * 0.5, rtol=0.02)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03


def test_half_precision_parameters_walk_in_float32():
    """Inner steps far below the resolution of bfloat16 add up."""
    theta = jnp.full(3, 100.0, jnp.bfloat16)
    tx = cx.local_entropy(0.0, steps=8, rate=1e-4, noise=0.0, decay=0.0, momentum=0.0)
    updates = first_updates(tx, cx.Objective(lambda w: jnp.sum(w.astype(jnp.float32))), theta)
    assert updates.dtype == jnp.bfloat16
    np.testing.assert_allclose(updates.astype(float), 8e-4, rtol=1e-2)


def test_numbers_may_be_schedules():
    late: Any = dict(rate=0.05, noise=0.02, decay=0.6, momentum=0.5)
    by_step = {name: lambda step, x=x: x * (1 + step) / 2 for name, x in late.items()}
    value_fn = cx.Objective(net_loss, batch_at(0))
    _, grads = value_fn.value_and_grad(PARAMS)
    found = []
    for options in (late, by_step):
        tx = cx.local_entropy(0.3, steps=3, **options)
        state = tx.init(PARAMS)._replace(step=jnp.int32(1))
        found.append(flat(tx.update(grads, state, PARAMS, value_fn=value_fn)[0]))
    np.testing.assert_allclose(found[0], found[1], **EXACT)


def test_the_signal_keeps_what_was_found_at_theta():
    value_fn = cx.Objective(lambda p, b: (net_loss(p, b), {"seen": p}), batch_at(0), has_aux=True)
    (value, aux), grads = value_fn.value_and_grad(PARAMS)
    tx = cx.local_entropy(0.3, steps=2)
    signal = cx.Signal(grads, grads, value=value, aux=aux)
    out, _ = tx.update(signal, tx.init(PARAMS), PARAMS, value_fn=value_fn)
    assert (out.gradient, out.value, out.aux) == (grads, value, aux)
    plain = first_updates(tx, cx.Objective(net_loss, batch_at(0)))
    np.testing.assert_allclose(flat(out.updates), flat(plain), **EXACT)


# Pieces of the batch


def dropped(params: Any, batch: Any, key: Any) -> jax.Array:
    kept = jax.random.bernoulli(key, 0.5, batch["x"].shape)
    return net_loss(params, {**batch, "x": jnp.where(kept, batch["x"], 0)})


@pytest.mark.parametrize("microbatch", [None, 1])
def test_split_batch_takes_a_piece_and_its_key_for_each_inner_step(microbatch):
    tx = cx.local_entropy(0.3, steps=4, noise=0.0, decay=DECAY, split_batch=True)
    whole = cx.Objective(dropped, batch_at(0), key=jax.random.key(5), microbatch=microbatch)
    of = []
    for i in range(4):
        piece = whole.piece(jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], batch_at(0)), i, 4)
        of.append(jax.jit(jax.grad(lambda w, piece=piece: piece(unravel(w)))))
    expected = walked(WEIGHTS, of, 0.3, momentum=MOMENTUM)
    found = quick_jit(lambda p: first_updates(tx, whole, p))(PARAMS)
    np.testing.assert_allclose(flat(found), expected, **EXACT)


def test_inner_steps_on_the_whole_batch_share_the_dropout_key():
    value_fn = cx.Objective(dropped, batch_at(0), key=jax.random.key(5))
    tx = cx.local_entropy(0.3, steps=3, noise=0.0, decay=DECAY)
    of = jax.grad(lambda w: dropped(unravel(w), batch_at(0), jax.random.key(5)))
    expected = walked(WEIGHTS, [of] * 3, 0.3, momentum=MOMENTUM)
    np.testing.assert_allclose(flat(first_updates(tx, value_fn)), expected, **EXACT)


def test_microbatches_change_nothing():
    tx = cx.entropy_sgd(optax.sgd(1.0), 0.3, steps=3)
    cut = lambda batch: cx.Objective(net_loss, batch, microbatch=2)
    np.testing.assert_allclose(flat(trained(tx, 2, cut)[0]), flat(trained(tx, 2)[0]), **EXACT)


def test_groups_walk_apart():
    tx = cx.per_group(4, cx.local_entropy(0.3, steps=3, noise=0.0, decay=DECAY)) | optax.sgd(1.0)
    found, _ = trained(tx, 1)
    assert_is_mean_of_walks(found, [slice(0, 4), slice(4, 8)], batch_at(0))


def assert_is_mean_of_walks(params: Any, parts: list[slice], batch: Any) -> None:
    """That the parameters are those after one step of size 1 to the mean of walks on these rows."""
    ends = []
    for part in parts:
        own = jax.tree.map(lambda x, part=part: x[part], batch)
        ends.append(walked(WEIGHTS, [partial(gradient, batch=own)] * 3, 0.3, momentum=MOMENTUM))
    np.testing.assert_allclose(flat(params), WEIGHTS - np.mean(ends, axis=0), **OVER_DEVICES)


# Devices


def each_loss(params: Any, batch: Any) -> jax.Array:
    one = lambda x, y: net_loss(params, {"x": x[None], "y": y[None]})
    return jax.vmap(one)(batch["x"], batch["y"])


def weighted_loss(params: Any, batch: Any) -> jax.Array:
    return jnp.sum(batch["w"] * each_loss(params, batch)) / jnp.sum(batch["w"])


weighted = partial(cx.Objective, weighted_loss, weight="w")
weighted_gradient = quick_jit(jax.grad(lambda w, batch: weighted_loss(unravel(w), batch)))


def stepping(tx: Any, way: str, objective_of: Any) -> Any:
    """A compiled step (params, state, batch) on eight devices with two examples each."""

    def step(params: Any, state: Any, batch: Any) -> Any:
        value_fn = objective_of(batch)
        _, grads = value_fn.value_and_grad(params)
        updates, state = tx.update(grads, state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    if way == "pmap":
        mapped = jax.pmap(step, "batch", in_axes=(None, None, 0), out_axes=None)
        cut = lambda x: x.reshape(8, 2, *x.shape[1:])
        return lambda p, s, batch: mapped(p, s, jax.tree.map(cut, batch))
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    specs, checked = (P(), P(), P("batch")), way == "checked"
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=checked))


WAYS = pytest.mark.parametrize("way", ["pmap", "checked", "unchecked"])


@WAYS
def test_devices_walk_apart_and_average_the_ends(way):
    tx = cx.entropy_sgd(optax.sgd(1.0), 0.3, steps=3, noise=0.0, decay=DECAY, mean_over="batch")
    step = stepping(tx, way, lambda batch: cx.Objective(net_loss, batch))
    params, _ = step(PARAMS, tx.init(PARAMS), net_batch(16))
    parts = [slice(i, i + 2) for i in range(0, 16, 2)]
    assert_is_mean_of_walks(params, parts, net_batch(16))


@WAYS
@pytest.mark.parametrize("split", [False, True])
def test_a_shared_walk_is_that_on_the_whole_batch_with_the_same_noise(way, split):
    """With devices of unequal weights; pieces hold examples of all devices."""
    options: Any = dict(steps=2, noise=0.05, key=3, split_batch=split)
    base = optax.sgd(1.0, momentum=0.5)
    tx = cx.entropy_sgd(base, 0.3, mean_over="batch", sync_over="batch", **options)
    batch = {**net_batch(16), "w": 0.5 + jnp.arange(16.0) % 5}
    rows = [slice(0, None, 2), slice(1, None, 2)] if split else [slice(None)] * 2
    of = [
        partial(weighted_gradient, batch=jax.tree.map(lambda x, part=part: x[part], batch))
        for part in rows
    ]
    step, params, state = stepping(tx, way, weighted), PARAMS, tx.init(PARAMS)
    w, velocity = WEIGHTS, np.zeros_like(WEIGHTS)
    for t in range(2):
        params, state = step(params, state, batch)
        noise: Any = dict(noise=0.05, drawn=partial(draws, 3, t))
        velocity = 0.5 * velocity + walked(w, of, 0.3, momentum=MOMENTUM, decay=0.75, **noise)
        w = w - velocity
    np.testing.assert_allclose(flat(params), w, **OVER_DEVICES)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharding_under_jit_changes_nothing(kind, split):
    """That of the batch and, as in FSDP, of the parameters."""
    tx = cx.entropy_sgd(optax.sgd(1.0), 0.3, steps=2, noise=0.05, split_batch=split)

    @quick_jit
    def step(w: Any, state: Any, batch: Any) -> Any:
        value_fn = cx.Objective(lambda w, x: jnp.mean((jnp.tanh(x @ w) - 0.5) ** 2), batch)
        return tx.update(value_fn.value_and_grad(w)[1], state, w, value_fn=value_fn)[0]

    w = jax.random.normal(jax.random.key(0), (16, 2))
    batch = jax.random.normal(jax.random.key(1), (16, 16))
    expected = step(w, tx.init(w), batch)
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        place = lambda x: jax.device_put(x, jax.NamedSharding(mesh, P("batch")))
        found = step(place(w), tx.init(place(w)), place(batch))
    assert found.sharding.is_equivalent_to(place(w).sharding, 2) or kind == AxisType.Auto
    np.testing.assert_allclose(np.asarray(found), expected, **OVER_DEVICES)


@pytest.mark.parametrize(
    ("way", "sync", "times"),
    [("checked", None, 1), ("checked", "batch", 3), ("unchecked", "batch", 3)],
)
def test_a_step_sends_the_parameters_once_or_for_each_inner_step(way, sync, times):
    tx = cx.entropy_sgd(optax.sgd(1.0), steps=3, mean_over="batch", sync_over=sync)
    step = stepping(tx, way, lambda batch: cx.Objective(net_loss, batch))
    compiled = step.lower(PARAMS, tx.init(PARAMS), net_batch(16)).compile()
    sent = sum(each.bytes for each in collectives.count(hlo.read(compiled)).values())
    metrics = 2 * 4
    assert times * WEIGHTS.size * 8 <= sent <= times * WEIGHTS.size * 8 + metrics


# Errors


def test_frozen_parameters_that_walk_are_warned_of():
    frozen = optax.masked(optax.set_to_zero(), {"hidden": True, "out": False})
    with pytest.warns(UserWarning, match=r"`local_entropy` moves.*`hidden/bias`.*partition"):
        (cx.local_entropy(0.1) | frozen).init(PARAMS)


SPLIT = cx.local_entropy(0.1, steps=3, split_batch=True)


@pytest.mark.parametrize(
    ("act", "told"),
    [
        (lambda: cx.local_entropy(-1.0), r"takes `scope` in \[0, inf\]"),
        (lambda: cx.local_entropy(0.1, rate=-0.1), "takes `rate`"),
        (lambda: cx.local_entropy(0.1, noise=-0.1), "takes `noise`"),
        (lambda: cx.local_entropy(0.1, decay=1.0), r"takes `decay` in \[0, 1\)"),
        (lambda: cx.local_entropy(0.1, momentum=1.0), "takes `momentum`"),
        (lambda: cx.local_entropy(0.1, steps=0), "`steps` as a positive integer"),
        (lambda: cx.local_entropy(0.1, sampler=WRONG), r"`local_entropy\(sampler=\)`"),
        (lambda: cx.local_entropy(20.0, rate=0.1), r"rate=0\.1 and scope=20\.0.*below 2"),
        (
            lambda: first_updates(SPLIT, cx.Objective(net_loss, net_batch())),
            "3 pieces, and it has 8 examples",
        ),
        (
            lambda: first_updates(SPLIT, cx.Objective(lambda p: net_loss(p, net_batch()))),
            "reads the batch behind the loss",
        ),
        (
            lambda: cx.pipe(optax.clip(1.0), cx.local_entropy(0.1)),
            "the change by `clip` would be lost",
        ),
        (
            lambda: first_updates(
                cx.sam_perturb(0.1) | cx.local_entropy(0.1), cx.Objective(net_loss, net_batch())
            ),
            "`local_entropy` replaces the updates",
        ),
        (
            lambda: first_updates(
                cx.local_entropy(0.1, steps=1) | cx.sam_perturb(0.1),
                cx.Objective(net_loss, net_batch()),
            ),
            "`sam_perturb` replaces the updates",
        ),
    ],
)
def test_what_cannot_be_right_is_refused(act, told):
    with pytest.raises((ValueError, TypeError), match=told):
        act()
