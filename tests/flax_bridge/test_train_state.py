"""`curvax.TrainState` where others subclass it, wrap parameters, or keep fp8 scales in them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import core
from flax import linen as nn
from flax.training import train_state

import curvax
from curvax import Objective, adahessian, gsam, per_group, sam, sam_perturb
from curvax.flax_bridge import TrainState

RHO, RATE = 0.05, 0.1
OVERWRITE = "_overwrite_with_gradient"


class Fp8(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Dense(16, dot_general_cls=nn.Fp8DirectDotGeneralOp)(x))


@pytest.fixture(scope="module")
def fp8():
    """(variables, loss, batch) in float32, which fp8 layers compute in."""
    with jax.enable_x64(False):
        batch = tuple(jax.random.normal(jax.random.key(i), (16, 16)) for i in (0, 1))
        net = Fp8()
        variables = net.init(jax.random.key(2), batch[0])
    return variables, lambda v, b: jnp.mean((net.apply(v, b[0]) - b[1]) ** 2), batch


def trained(fp8, tx, steps=2):
    variables, loss, batch = fp8

    @jax.jit
    def step(state):
        objective = Objective(loss, batch)
        value, grads = objective.value_and_grad(state.params)
        return value, state.apply_gradients(grads=grads, value_fn=objective, value=value)

    state = TrainState.create(apply_fn=None, params=variables, tx=tx)
    for _ in range(steps):
        value, state = step(state)
    return value, state


def by_hand(fp8, step, steps=2):
    """`step(p, gradient, loss of p)` on `params` alone, with the scales of the clean pass."""
    variables, loss, batch = fp8

    @jax.jit
    def whole(both):
        value, g = jax.value_and_grad(loss)(both, batch)
        alone = lambda q, b: loss({"params": q, OVERWRITE: both[OVERWRITE]}, b)
        return value, {"params": step(both["params"], g["params"], alone), OVERWRITE: g[OVERWRITE]}

    for _ in range(steps):
        value, variables = whole(variables)
    return value, variables


def sam_step(p, g, loss, batch):
    length = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(g)))
    moved = jax.tree.map(lambda w, e: w + RHO / length * e, p, g)
    return jax.grad(loss)(moved, batch)


def descended(p, g):
    return jax.tree.map(lambda w, e: w - RATE * e, p, g)


def assert_close(a, b, tolerance=2e-5):
    """In float32, through products rounded to eight bits."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def test_fp8_scales_are_those_of_the_clean_pass_and_params_those_of_sam(fp8, single_precision):
    batch = fp8[2]
    expected = by_hand(fp8, lambda p, g, loss: descended(p, sam_step(p, g, loss, batch)))
    for tx in (sam(optax.sgd(RATE), RHO), gsam(optax.sgd(RATE), RHO, 0.0)):
        value, state = trained(fp8, tx)
        assert_close((value, state.params), expected)
    scales = jax.tree.leaves(state.params[OVERWRITE])
    assert any(np.any(x != y) for x, y in zip(scales, jax.tree.leaves(fp8[0][OVERWRITE])))


def test_fp8_groups_share_one_set_of_scales(fp8, single_precision):
    def step(p, _, loss):
        parts = [tuple(x[i : i + 8] for x in fp8[2]) for i in (0, 8)]
        grads = [sam_step(p, jax.grad(loss)(p, part), loss, part) for part in parts]
        return descended(p, jax.tree.map(lambda x, y: (x + y) / 2, *grads))

    tx = per_group(8, sam_perturb(RHO)) | optax.sgd(RATE)
    value, state = trained(fp8, tx)
    assert_close((value, state.params), by_hand(fp8, step))


def test_fp8_adahessian_is_that_of_the_loss_of_the_parameters_alone(fp8, single_precision):
    tx = adahessian(0.01, b1=0.0, b2=0.0)

    def step(p, g, loss):
        alone = lambda q: loss(q, fp8[2])
        return optax.apply_updates(p, tx.update(g, tx.init(p), p, value_fn=alone)[0])

    value, state = trained(fp8, tx, 1)
    assert_close((value, state.params), by_hand(fp8, step, 1), 1e-4)


def test_fp8_objective_recognises_its_own_gradient(fp8, single_precision):
    """The cached gradient of the objective is recognised for the loss of `params` alone."""
    seen = []

    def update(updates, state, params, *, value_fn, value, **extra):
        given = value_fn.cached_gradient(params, updates)
        seen.append(given is not None and given.value is value)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    trained(fp8, tx, 1)
    assert seen == [True]


def quadratic(params):
    return jnp.sum((params["w"] - jnp.asarray([1.0, -2.0])) ** 2)


def test_train_state_subclasses_add_fields():
    class Mine(TrainState):
        ema: Any
        metrics: Any = None

    class Imagenet(TrainState):
        batch_stats: Any
        dynamic_scale: Any

    params = {"w": jnp.zeros(2)}
    given = {"apply_fn": None, "params": params, "tx": sam(optax.sgd(0.1), 0.05)}
    mine = Mine.create(**given, ema=params)
    assert (mine.ema, mine.metrics, mine.batch_stats) == (params, None, {})
    grads = jax.grad(quadratic)(params)
    new = mine.apply_gradients(grads=grads, value_fn=quadratic, metrics=1)
    assert isinstance(new, Mine)
    assert (new.metrics, int(new.step)) == (1, 1)
    assert mine.replace(metrics=2).metrics == 2
    state = Imagenet.create(**given, batch_stats={"mean": jnp.ones(1)}, dynamic_scale=None)
    state = state.apply_gradients(grads=grads, value_fn=quadratic, batch_stats={})
    assert state.batch_stats == {}


def test_flax_own_train_state_raises_with_ours():
    params = {"w": jnp.zeros(2)}
    state = train_state.TrainState.create(apply_fn=None, params=params, tx=sam(optax.sgd(0.1)))
    with pytest.raises(ValueError, match=r"`curvax\.TrainState`"):
        state.apply_gradients(grads=params, value_fn=quadratic)
    assert curvax.TrainState is TrainState


@pytest.mark.parametrize("box", [nn.Partitioned, nn.LogicallyPartitioned])
def test_boxed_and_frozen_parameters_step_like_bare_ones(box):
    bare = {"w": jnp.asarray([0.3, 0.7])}
    boxed = {"w": box(bare["w"], ("x",))}
    kinds = [(core.freeze(bare), quadratic), (boxed, lambda p: quadratic(nn.meta.unbox(p)))]
    for make in (lambda: sam(optax.sgd(0.1), RHO), lambda: adahessian(0.1)):
        expected, *found = (
            self_step(make(), params, loss) for params, loss in [(bare, quadratic), *kinds]
        )
        for params in found:
            assert_close(params, expected, 1e-12)


def self_step(tx, params, loss):
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    value, grads = Objective(loss).value_and_grad(params)
    return state.apply_gradients(grads=grads, value_fn=loss, value=value).params
