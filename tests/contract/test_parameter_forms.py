"""Parameters in the forms that other code has them: numbers, arrays of NumPy, None, tables of
integers, vectors of `optax.flatten`; and losses that return something else than a scalar."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from curvax import Objective, adahessian, newton_cg, per_group, restrict, sam, sam_perturb

BATCH = (jax.random.normal(jax.random.key(0), (6, 3)), jnp.arange(6) % 2)
PLAIN = {"a": jnp.asarray(1.5), "w": jnp.arange(3.0) / 3}
METHODS = {
    "sam": lambda: sam(optax.sgd(0.1), 0.05),
    "adahessian": lambda: adahessian(0.1),
    "newton_cg": lambda: newton_cg(0.1),
    "per_group": lambda: per_group(3, sam_perturb(0.05)) | optax.adam(0.1),
}
FORMS = {
    "a number": {**PLAIN, "a": 1.5},
    "numpy": {"a": np.float64(1.5), "w": np.arange(3.0) / 3},
    "none": {**PLAIN, "nothing": None},
}


def loss(params, batch):
    return jnp.mean((jnp.sin(batch[0] @ params["w"]) * params["a"] - batch[1]) ** 2)


def stepped(tx, params):
    objective, state = Objective(loss, BATCH), tx.init(params)
    for _ in range(2):
        value, grads = objective.value_and_grad(params)
        updates, state = tx.update(grads, state, params, value_fn=objective, value=value)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("method", METHODS)
def test_numbers_and_numpy_arrays_step_like_arrays(method):
    tx = METHODS[method]()
    expected = stepped(tx, PLAIN)
    for params in FORMS.values():
        found = stepped(tx, params)
        for name, x in expected.items():
            np.testing.assert_allclose(found[name], x, rtol=1e-12)


TABLE = {"w": jnp.ones(3), "table": jnp.arange(3)}


def of_table(params):
    return jnp.sum((params["w"] * params["table"] - 1) ** 2)


def test_integers_have_a_gradient_of_zeros():
    _, grads = Objective(of_table).value_and_grad(TABLE)
    expected = jax.grad(lambda w: of_table({**TABLE, "w": w}))(TABLE["w"])
    np.testing.assert_allclose(grads["w"], expected)
    assert grads["table"].dtype == TABLE["table"].dtype
    assert not grads["table"].any()
    microbatched = Objective(lambda p, b: of_table(p) + jnp.mean(b), jnp.ones(4), microbatch=2)
    assert microbatched.value_and_grad(TABLE)[1]["table"].shape == (3,)


@pytest.mark.parametrize("inner", [lambda: sam(optax.sgd(0.1), 0.05), lambda: adahessian(0.1)])
def test_restrict_leaves_integers_unchanged_and_steps_the_rest(inner):
    tx = restrict(inner(), {"w": True, "table": False})
    with pytest.raises(TypeError, match=r"`table` has dtype int.*curvax\.restrict"):
        inner().init(TABLE)
    objective = Objective(of_table)
    _, grads = objective.value_and_grad(TABLE)
    updates, _ = tx.update(grads, tx.init(TABLE), TABLE, value_fn=objective)
    new = optax.apply_updates(TABLE, updates)
    alone = lambda p: of_table({**TABLE, **p})
    bare, params = inner(), {"w": TABLE["w"]}
    expected, _ = bare.update(jax.grad(alone)(params), bare.init(params), params, value_fn=alone)
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-12)
    np.testing.assert_array_equal(new["table"], TABLE["table"])
    assert new["table"].dtype == TABLE["table"].dtype


def test_flattened_parameters_raise_with_optax_flatten():
    tx = optax.flatten(sam(optax.sgd(0.1)))
    for value_fn in (Objective(loss, BATCH), lambda p: loss(p, BATCH)):
        grads = jax.tree.map(jnp.ones_like, PLAIN)
        with pytest.raises(TypeError, match=r"`optax.flatten`.*sam_perturb\(rho\)"):
            tx.update(grads, tx.init(PLAIN), PLAIN, value_fn=value_fn)
    base = sam_perturb(0.05) | optax.flatten(optax.sgd(0.1))
    for x, y in zip(
        *map(jax.tree.leaves, (stepped(base, PLAIN), stepped(METHODS["sam"](), PLAIN)))
    ):
        np.testing.assert_allclose(x, y, rtol=1e-12)


def test_errors_of_the_loss_pass_unchanged():
    with pytest.raises(KeyError, match="missing"):
        Objective(lambda p: p["missing"]).value_and_grad(PLAIN)
    with pytest.raises(ValueError, match="mine"):
        Objective(_raising).value_and_grad(jnp.ones(3))


def _raising(params):
    raise ValueError("mine")


def test_gradient_of_other_parameters_is_refused():
    tx = sam(optax.sgd(0.1))
    with pytest.raises(ValueError, match="gradient of 1 arrays for parameters of 2"):
        tx.update({"w": PLAIN["w"]}, tx.init(PLAIN), PLAIN, value_fn=lambda p: loss(p, BATCH))


@pytest.mark.parametrize(
    "returned",
    [
        lambda x: (x, x),
        lambda x: [x, x],
        lambda x: {"loss": x, "accuracy": x},
        lambda x: (x, x, x),
    ],
)
def test_closure_with_aux_raises_with_the_objective(returned: Any):
    tx, value_fn = sam(optax.sgd(0.1)), lambda p: returned(loss(p, BATCH))
    with pytest.raises(TypeError, match=r"Objective\(loss_fn, has_aux=True\)"):
        tx.update(PLAIN, tx.init(PLAIN), PLAIN, value_fn=value_fn)


def test_loss_that_returns_no_scalar_is_refused():
    with pytest.raises(TypeError, match="returned None"):
        Objective(lambda p: None)(PLAIN)
    with pytest.raises(TypeError, match=r"first part .* a tuple of 2"):
        Objective(lambda p: ((p["a"], 1), 2), has_aux=True).value_and_grad(PLAIN)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda tx: optax.GradientTransformation(tx.init, lambda u, s, p: tx.update(u, s, p)),
        lambda tx: optax.chain(
            optax.GradientTransformation(tx.init, lambda u, s, p=None: tx.update(u, s, p))
        ),
    ],
)
def test_wrapper_that_drops_the_loss_raises_with_the_known_ones(wrapped):
    tx = optax.with_extra_args_support(wrapped(sam(optax.sgd(0.1))))
    with pytest.raises(ValueError, match="value_fn") as told:
        tx.update(PLAIN, tx.init(PLAIN), PLAIN, value_fn=lambda p: loss(p, BATCH))
    for name in ("TrainState.apply_gradients", "curvax.TrainState", "axlearn", "Kauldron",
                 "EasyLM", "optax.lookahead", "optax.flatten", "value_fn=objective"):  # fmt: skip
        assert name in str(told.value)


def test_optax_lookahead_is_refused():
    tx = optax.lookahead(sam(optax.sgd(0.1)), 2, 0.5)
    params = optax.LookaheadParams.init_synced(PLAIN)
    with pytest.raises(ValueError, match=r"optax\.lookahead"):
        tx.update(PLAIN, tx.init(params), params)


def test_hvp_takes_python_numbers():
    number, array = ({"a": x, "w": PLAIN["w"]} for x in (1.5, jnp.asarray(1.5)))
    fs = [curvax.hvp(lambda p: loss(p, BATCH), p)(PLAIN) for p in (number, array)]
    assert jax.tree.all(jax.tree.map(jnp.allclose, *fs))
