"""nnx losses as Flax's examples write them, against `nnx.value_and_grad` and by hand."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from curvax import Objective, adahessian, compat, per_group, sam, sam_perturb
from curvax.flax_bridge import nnx_loss

BATCH = {"image": jax.random.normal(jax.random.key(0), (8, 4)), "label": jnp.arange(8) % 3}
RHO = 0.1
OLD = tuple(map(int, flax.__version__.split(".")[:2])) < (0, 12)

pytestmark = pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")


class Sowing(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 8, rngs=rngs, param_dtype=jnp.float64)
        self.last = nnx.Linear(8, 3, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, x):
        h = nnx.relu(self.first(x))
        self.sow(nnx.Intermediate, "load", jnp.mean(h))
        return self.last(h)


class Dropping(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 8, rngs=rngs, param_dtype=jnp.float64)
        self.last = nnx.Linear(8, 3, rngs=rngs, param_dtype=jnp.float64)
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, x, rngs):
        return self.last(self.dropout(nnx.relu(self.first(x)), rngs=rngs))


def cross_entropy(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def sowing_loss(model, batch):
    return cross_entropy(model(batch["image"]), batch)


def with_logits(model, batch):
    logits = model(batch["image"])
    return cross_entropy(logits, batch), logits


def plain(node):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(node, nnx.Not(nnx.RngKey))))


def assert_same(a, b, tolerance=1e-12):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance), a, b)


def flax_step(tx):
    """The step of Flax's documentation."""

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(sowing_loss)(model, BATCH)
        optimizer.update(model, grads)
        return value

    return trained(step, tx)


def trained(step, tx, steps=2):
    model = Sowing(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    values = [float(step(model, optimizer)) for _ in range(steps)]
    return values, plain(model)


def curvax_step(tx, **options):
    @nnx.jit
    def step(model, optimizer):
        loss, params = nnx_loss(model, sowing_loss)
        objective = Objective(loss, BATCH, has_aux=True, **options)
        (value, state), grads = objective.value_and_grad(params)
        optimizer.update(model, grads, value_fn=objective, value=value)
        nnx.update(model, state)
        return value

    return trained(step, tx)


@pytest.mark.parametrize(
    ("tx", "options"),
    [
        (lambda: sam(optax.sgd(0.1), 0.0), {}),
        (lambda: sam(optax.sgd(0.1), 0.0), {"microbatch": 4}),
        (lambda: per_group(4, sam_perturb(0.0)) | optax.sgd(0.1), {}),
        (lambda: optax.sgd(0.1), {}),
    ],
    ids=["sam", "microbatch", "per-group", "sgd"],
)
def test_variables_sown_by_the_loss_are_updated_as_by_nnx_value_and_grad(tx, options):
    """At ρ = 0 two steps train like Flax's own, and the module gets the same variable."""
    values, model = curvax_step(tx(), **options)
    expected_values, expected = flax_step(optax.sgd(0.1))
    np.testing.assert_allclose(values, expected_values, rtol=1e-12)
    if not options:
        assert_same(model, expected)
        assert len(model["load"]) == 2
    else:
        assert_same(model["first"], expected["first"])


def test_adahessian_trains_a_module_with_sown_variables():
    """Its first update from the exact product is that of the same network without sowing."""
    _, model = curvax_step(adahessian(0.1))
    flat = Sowing(nnx.Rngs(0))
    graphdef, params = nnx.split(flat)
    loss = lambda p: sowing_loss(nnx.merge(graphdef, p, copy=True), BATCH)
    tx, p = adahessian(0.1), compat.as_pure(params)
    state = tx.init(p)
    for _ in range(2):
        updates, state = tx.update(jax.grad(loss)(p), state, p, value_fn=loss)
        p = optax.apply_updates(p, updates)
    found = {name: model[name] for name in ("first", "last")}
    assert_same(found, nnx.to_pure_dict(p), 1e-9)


def test_aux_of_the_loss_comes_before_the_state():
    model = Sowing(nnx.Rngs(0))
    loss, params = nnx_loss(model, with_logits, has_aux=True)
    objective = Objective(loss, BATCH, has_aux=True)
    (value, (logits, state)), grads = objective.value_and_grad(params)
    (expected, aux), expected_grads = nnx.value_and_grad(with_logits, has_aux=True)(model, BATCH)
    np.testing.assert_allclose(value, expected)
    np.testing.assert_allclose(logits, aux)
    assert_same(nnx.to_pure_dict(compat.as_pure(grads)), nnx.to_pure_dict(expected_grads))
    assert set(state) == {"load"}


def test_mismatch_of_has_aux_and_loss_raises():
    model = Sowing(nnx.Rngs(0))
    loss, params = nnx_loss(model, with_logits)
    with pytest.raises(TypeError, match=r"nnx_loss\(model, loss_fn, has_aux=True"):
        Objective(loss, BATCH, has_aux=True).value_and_grad(params)
    loss, params = nnx_loss(model, sowing_loss, has_aux=True)
    with pytest.raises(TypeError, match="has_aux"):
        Objective(loss, BATCH, has_aux=True).value_and_grad(params)


def test_outputs_of_an_nnx_model_can_be_a_tuple():
    loss, params = nnx_loss(
        Sowing(nnx.Rngs(0)), lambda model, batch: (model(batch["image"]), jnp.ones(8))
    )
    outputs, _ = loss(params, BATCH)
    assert outputs[0].shape == (8, 3)


def dropping_loss(model, batch, rngs):
    return cross_entropy(model(batch["image"], rngs), batch)


def tutorial_loss(model, rngs, batch):
    """The order of Flax's MNIST tutorial, with its aux."""
    logits = model(batch["image"], rngs)
    return cross_entropy(logits, batch), logits


def by_hand(model, rngs, rho=RHO):
    """SAM's updated parameters with the same masks in both passes: arXiv:2010.01412, eq. 2, 3."""
    graphdef, params = nnx.split(model)
    streams = nnx.split(rngs)

    def loss(p):
        return dropping_loss(nnx.merge(graphdef, p), BATCH, nnx.merge(*streams, copy=True))

    p = compat.as_pure(params)
    g = jax.grad(loss)(p)
    length = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(g)))
    moved = jax.tree.map(lambda x, y: x + rho * y / length, p, g)
    new = jax.tree.map(lambda x, y: x - 0.1 * y, p, jax.grad(loss)(moved))
    return loss(p), nnx.to_pure_dict(new)


@pytest.mark.parametrize("has_aux", [False, True])
def test_rngs_draw_the_same_in_both_passes_and_advance_once(has_aux):
    model, rngs = Dropping(nnx.Rngs(0)), nnx.Rngs(dropout=3)
    optimizer = nnx.Optimizer(model, sam(optax.sgd(0.1), RHO), wrt=nnx.Param)
    fn = tutorial_loss if has_aux else dropping_loss

    @nnx.jit
    def step(model, optimizer, rngs):
        loss, params = nnx_loss(model, fn, rngs=rngs, has_aux=has_aux)
        objective = Objective(loss, BATCH, has_aux=True)
        (value, (*_, state, streams)), grads = objective.value_and_grad(params)
        optimizer.update(model, grads, value_fn=objective, value=value)
        nnx.update(model, state)
        nnx.update(rngs, streams)
        return value

    for count in (1, 2):
        value, expected = by_hand(model, rngs)
        np.testing.assert_allclose(step(model, optimizer, rngs), value, rtol=1e-12)
        assert_same(plain(model), expected)
        assert int(rngs.dropout.count[...]) == count


def test_key_gives_microbatches_their_own_draws_with_or_without_streams():
    model = Dropping(nnx.Rngs(0))
    for rngs in (nnx.Rngs(dropout=3), None):
        loss, params = nnx_loss(model, dropping_loss, rngs=rngs)
        values = [float(loss(params, BATCH, jax.random.key(seed))[0]) for seed in (1, 1, 2)]
        assert values[0] == values[1] != values[2]
        key = jax.random.key(5)
        objective = Objective(loss, BATCH, has_aux=True, key=key, microbatch=4)
        (found, _), _ = objective.value_and_grad(params)
        parts = [jax.tree.map(lambda x, i=i: x[i : i + 4], BATCH) for i in (0, 4)]
        by_part = [loss(params, x, jax.random.fold_in(key, i))[0] for i, x in enumerate(parts)]
        np.testing.assert_allclose(found, sum(by_part) / 2, rtol=1e-12)


def test_missing_and_invalid_rngs_raise():
    model = Dropping(nnx.Rngs(0))
    loss, params = nnx_loss(model, dropping_loss)
    with pytest.raises(TypeError, match="rngs=rngs"):
        loss(params, BATCH)
    with pytest.raises(TypeError, match=r"nnx\.Rngs"):
        nnx_loss(model, dropping_loss, rngs=jax.random.key(0))  # type: ignore[arg-type]


def lora_model():
    return nnx.LoRALinear(4, 3, lora_rank=2, rngs=nnx.Rngs(0), param_dtype=jnp.float64)


def squares(model, batch):
    return jnp.mean((model(batch["image"]) - 1.0) ** 2)


@pytest.mark.parametrize(
    "narrow",
    [
        nnx.LoRAParam,
        nnx.All(nnx.Param, nnx.PathContains("lora_b")),
        nnx.Any("lora_a", nnx.LoRAParam),
    ],
    ids=["type", "path", "any"],
)
def test_a_narrower_filter_of_the_optimiser_trains_its_parameters_alone(narrow):
    """`wrt` forgotten in `nnx_loss` gives the same step as `wrt` there.

    Flax 0.11 passes the wider gradient on, which is refused.
    """
    found = []
    for options in ({"wrt": narrow}, {}):
        model = lora_model()
        optimizer = nnx.Optimizer(model, sam(optax.sgd(0.1), RHO), wrt=narrow)
        loss, params = nnx_loss(model, squares, **options)
        objective = Objective(loss, BATCH, has_aux=True)
        (value, state), grads = objective.value_and_grad(params)
        if OLD and not options:
            with pytest.raises(ValueError, match="wrt="):
                optimizer.update(model, grads, value_fn=objective)
            return
        optimizer.update(model, grads, value_fn=objective, value=value)
        nnx.update(model, state)
        found.append(plain(model))
    assert_same(*found)
    np.testing.assert_array_equal(found[1]["kernel"], plain(lora_model())["kernel"])
    before = plain(lora_model())["lora"]["lora_b"]
    assert np.abs(found[1]["lora"]["lora_b"] - before).max() > 0


def test_wider_filter_of_the_optimiser_is_refused():
    model = lora_model()
    optimizer = nnx.Optimizer(model, sam(optax.sgd(0.1), RHO), wrt=nnx.Param)
    loss, params = nnx_loss(model, squares, wrt=nnx.LoRAParam)
    objective = Objective(loss, BATCH, has_aux=True)
    _, grads = objective.value_and_grad(params)
    with pytest.raises(ValueError, match="wrt="):
        optimizer.update(model, grads, value_fn=objective)
    with pytest.raises(ValueError, match="same filter"):
        loss(nnx.state(model, nnx.Param), BATCH)


def test_loss_of_the_module_as_value_fn_is_refused():
    model = lora_model()
    optimizer = nnx.Optimizer(model, sam(optax.sgd(0.1), RHO), wrt=nnx.Param)
    grads = nnx.grad(squares)(model, BATCH)
    with pytest.raises(TypeError, match=r"curvax\.nnx_loss"):
        optimizer.update(model, grads, value_fn=lambda model: squares(model, BATCH))


def test_parameters_created_or_variables_removed_in_the_loss_are_refused():
    def lazy(model, batch):
        model.extra = nnx.Param(jnp.ones(()))
        return squares(model, batch)

    loss, params = nnx_loss(lora_model(), lazy)
    with pytest.raises(ValueError, match="`extra`, which no optimiser knows"):
        loss(params, BATCH)

    def popping(model, batch):
        value = sowing_loss(model, batch)
        return value + sum(jax.tree.leaves(nnx.pop(model, nnx.Intermediate)))

    model = Sowing(nnx.Rngs(0))
    loss, params = nnx_loss(model, popping)
    _, state = loss(params, BATCH)
    assert jax.tree.leaves(state) == []
    model(BATCH["image"])
    loss, params = nnx_loss(model, popping)
    with pytest.raises(ValueError, match="removed the variable `load`"):
        loss(params, BATCH)
