"""A scaled loss: the same numbers in exact arithmetic, and numbers at all in float16."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.dynamic_scale import DynamicScale
from jax.sharding import PartitionSpec as P
from small_problems import assert_trees_close, quick_jit

import curvax as cx

X = jax.random.normal(jax.random.key(0), (8, 4))
BATCH = {"x": X, "y": jnp.arange(8) % 3, "w": 1.0 + jnp.arange(8.0)}
PARAMS = {
    "k": jax.random.normal(jax.random.key(1), (4, 5)) / 2,
    "out": jax.random.normal(jax.random.key(2), (5, 3)),
}
V = jax.tree.map(lambda p: jnp.sin(9 * p), PARAMS)


def predict(params: Any, batch: Any, dtype: Any = jnp.float64) -> jax.Array:
    params, x = optax.tree.cast(params, dtype), batch["x"].astype(dtype)
    return jnp.tanh(x @ params["k"]) @ params["out"]


def cross_entropy(z: jax.Array, batch: Any) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(z, batch["y"])
    return jnp.sum(batch["w"] * losses) / jnp.sum(batch["w"])


def whole(params: Any, batch: Any, dtype: Any = jnp.float64) -> jax.Array:
    return cross_entropy(predict(params, batch, dtype), batch)


KINDS: dict[str, Any] = {
    "likelihood": dict(loss=cx.categorical("y"), model=predict),
    "loss of outputs": dict(loss=cross_entropy, model=predict, weight="w"),
    "loss of parameters": dict(loss=whole, weight="w"),
    "micro-batches": dict(loss=cross_entropy, model=predict, weight="w", microbatch=2),
    "aux": dict(
        loss=lambda params, batch: (whole(params, batch), {"seen": jnp.sum(batch["x"])}),
        weight="w",
        has_aux=True,
        microbatch=4,
    ),
}


def objective(kind: str, **options: Any) -> cx.Objective:
    given = KINDS[kind] | options
    return cx.Objective(given.pop("loss"), BATCH, **given)


def passes(objective: cx.Objective, params: Any) -> dict[str, Any]:
    """Everything that is differentiated, at one point."""
    found = {
        "gradient": objective.value_and_grad(params),
        "hessian": cx.hvp(objective, params)(V),
        "reverse": cx.hvp(objective, params, mode="reverse-over-reverse")(V),
        "differences": cx.hvp(objective, params, mode="finite-differences")(V),
        "empirical": cx.empirical_fvp(objective, params)(V),
    }
    if objective.model is not None:
        found["gauss-newton"] = cx.ggnvp(objective, params)(V)
    if objective.loss is not cross_entropy and objective.model is not None:
        key = jax.random.key(3)
        found["fisher"] = cx.fvp(objective, params, samples=2, key=key)(V)
    return found


@cache
def unscaled(kind: str) -> dict[str, Any]:
    return quick_jit(partial(passes, objective(kind)))(PARAMS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [2.0**15, jnp.float32(2.0**-9), 2**7])
def test_scaling_by_a_power_of_two_changes_nothing(kind, scale):
    """Every intermediate is scaled exactly, unless what is fused makes other roundings."""
    found = quick_jit(partial(passes, objective(kind, scale=scale)))(PARAMS)
    assert_trees_close(found, unscaled(kind), 1e-9)
    given = jax.jit(lambda s: objective(kind, scale=s).value_and_grad(PARAMS))(scale)
    assert_trees_close(given, unscaled(kind)["gradient"], 1e-13)


METHODS = {
    "gsam": lambda: cx.gsam(optax.sgd(0.1), 0.1, 0.4, steps=2, second_order=True),
    "per_group": lambda: cx.per_group(4, cx.sam_perturb(0.1)),
    "adahessian": lambda: cx.adahessian(0.1),
    "sophia_g": lambda: cx.sophia_g(0.1),
    "gauss_newton_diag": lambda: cx.gauss_newton_diag(probes=2) | cx.scale_by_power(1.0, eps=0.1),
    "empirical": lambda: cx.empirical_fisher_diag() | cx.scale_by_power(1.0, eps=0.1),
    "exact": lambda: cx.exact_diag("empirical_fisher") | cx.scale_by_power(1.0, eps=0.1),
    "natural_gradient": lambda: cx.natural_gradient(0.1, solver=cx.cg(3), samples=2),
    "row_space": lambda: cx.gauss_newton(0.1, solver=cx.row_space()),
    "hessian_free": lambda: cx.hessian_free(0.1, solver=cx.cg(3)),
    "newton_cg": lambda: cx.newton_cg(0.1, damping=0.5, solver=cx.cg(3)),
    "in the Fisher metric": lambda: cx.sam_perturb(0.1, ascent=cx.fisher_ascent(solver=cx.cg(3))),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_the_same_step_at_any_scale(name):
    tx = METHODS[name]()

    @jax.jit
    def step(scale: Any) -> Any:
        value_fn = objective("likelihood", scale=scale)
        _, grads = value_fn.value_and_grad(PARAMS)
        updates, state = tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=value_fn)
        return updates, cx.diagnostics(state)

    (updates, figures), (expected, of_expected) = step(2.0**12), step(1.0)
    assert_trees_close(updates, expected, 1e-9)
    # Diagnostics are float32, and never scaled.
    assert_trees_close(figures, of_expected, 1e-5)


# In float16: gradients of 1e-9 are below its smallest number, 6e-8.

TINY = 2.0**-26
SCALE = 2.0**18


def tiny(params: Any, batch: Any, dtype: Any) -> jax.Array:
    """A loss whose last steps, and all that is pulled back through them, are in `dtype`."""
    z = predict(params, batch, dtype)
    return jnp.mean((z * z).astype(jnp.float32)) * TINY


def tiny_objective(dtype: Any, **options: Any) -> cx.Objective:
    return cx.Objective(lambda p, b: tiny(p, b, dtype), BATCH, **options)


def tiny_halves(dtype: Any, **options: Any) -> cx.Objective:
    loss = lambda z, batch: jnp.mean((z * z).astype(jnp.float32)) * TINY
    model = lambda p, b: predict(p, b, dtype)
    return cx.Objective(loss, BATCH, model=model, **options)


def relative(found: Any, expected: Any) -> float:
    norm = lambda tree: float(optax.tree.norm(optax.tree.cast(tree, jnp.float64)))
    return norm(jax.tree.map(lambda a, b: a - b, found, expected)) / norm(expected)


def in_single(tree: Any) -> Any:
    return optax.tree.cast(tree, jnp.float32)


HALF: dict[str, Any] = {
    "gradient": lambda objective, p: objective.value_and_grad(p)[1],
    "hvp": lambda objective, p: cx.hvp(objective, p)(in_single(V)),
    "hvp of a small vector": lambda objective, p: optax.tree.scale(
        1e9, cx.hvp(objective, p)(optax.tree.scale(1e-9, in_single(V)))
    ),
    "hvp in reverse": lambda objective, p: cx.hvp(objective, p, mode="reverse-over-reverse")(
        in_single(V)
    ),
    "ggnvp": lambda objective, p: cx.ggnvp(objective, p)(in_single(V)),
    "empirical fvp": lambda objective, p: optax.tree.scale(
        1e6, cx.empirical_fvp(objective, p)(in_single(V))
    ),
    "examples": lambda objective, p: [
        jnp.sqrt(x)
        for x in jax.tree.leaves(
            cx.empirical_fisher_diag()
            .update(cx.Signal(p, p), optax.EmptyState(), p, value_fn=objective)[0]
            .diagonal
        )
    ],
    "second gradient": lambda objective, p: cx.sam_perturb(0.1).update(
        HALF["gradient"](tiny_halves(jnp.float64), p),
        cx.sam_perturb(0.1).init(p),
        p,
        value_fn=objective,
    )[0],
}


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("microbatch", [None, 4])
def test_scaled_loss_does_not_underflow_in_float16(name, microbatch):
    single = in_single(PARAMS)
    make = tiny_halves if name == "ggnvp" else tiny_objective
    expected = HALF[name](make(jnp.float64), single)
    lost = HALF[name](make(jnp.float16, microbatch=microbatch), single)
    kept = HALF[name](make(jnp.float16, microbatch=microbatch, scale=SCALE), single)
    assert relative(lost, expected) > 0.5
    # A few roundings of 2⁻¹¹ each.
    assert relative(kept, expected) < 5e-3


def test_output_noise_does_not_overflow_in_float16():
    """At the scale of a mean over 8 examples, which each count fully in a square."""
    model = lambda p, b: predict(p, b, jnp.float16)
    single, scale = in_single(PARAMS), 2.0**16
    # Labels are drawn in the precision of the outputs.
    exact = lambda p, b: predict(p, b).astype(jnp.float32)
    for tx in (cx.gauss_newton_diag(3, probes=2), cx.fisher_diag(3)):
        diagonal = lambda model, scale, tx=tx: (
            tx.update(
                cx.Signal(single, single),
                tx.init(single),
                single,
                value_fn=cx.Objective(cx.categorical("y"), BATCH, model=model, scale=scale),
            )[0].diagonal
        )
        assert relative(diagonal(model, scale), diagonal(exact, None)) < 1e-2


@pytest.mark.filterwarnings("ignore:`sam_perturb` on parameters in half precision")
def test_float16_parameters_get_float32_gradients_with_a_scale():
    half = optax.tree.cast(PARAMS, jnp.float16)
    value_fn = tiny_objective(jnp.float16, scale=SCALE)
    (_, grads), product = value_fn.value_and_grad(half), cx.hvp(value_fn, half)(V)
    assert {x.dtype for x in jax.tree.leaves((grads, product))} == {jnp.dtype(jnp.float32)}
    exact = optax.tree.cast(half, jnp.float64)
    assert relative(grads, tiny_objective(jnp.float64).value_and_grad(exact)[1]) < 5e-3
    assert relative(product, cx.hvp(tiny_objective(jnp.float64), exact)(V)) < 5e-3
    tx = cx.sam(optax.sgd(0.1), 0.1)
    updates, _ = tx.update(grads, tx.init(half), half, value_fn=value_fn)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float32)}


def test_called_objective_returns_the_unscaled_loss():
    value_fn = objective("likelihood", scale=2.0**10)
    plain = objective("likelihood")
    np.testing.assert_allclose(value_fn(PARAMS), plain(PARAMS), rtol=1e-15)
    assert_trees_close(jax.grad(value_fn)(PARAMS), jax.grad(plain)(PARAMS))
    through = value_fn.through(lambda p: jax.tree.map(jnp.sin, p))
    expected = plain.through(lambda p: jax.tree.map(jnp.sin, p))
    assert_trees_close(through.value_and_grad(PARAMS), expected.value_and_grad(PARAMS), 1e-13)


def test_scale_applies_on_every_device():
    mesh = jax.make_mesh((4,), ("batch",), (jax.sharding.AxisType.Auto,))
    tx = cx.sam(optax.sgd(0.1), 0.1, mean_over="batch")

    @jax.jit
    @partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P(), P("batch")), out_specs=P()
    )  # fmt: skip
    def step(scale: Any, params: Any, batch: Any) -> Any:
        value_fn = cx.Objective(cross_entropy, batch, model=predict, weight="w", scale=scale)
        _, grads = value_fn.value_and_grad(params)
        return tx.update(grads, tx.init(params), params, value_fn=value_fn)[0]

    found, expected = (step(scale, PARAMS, BATCH) for scale in (2.0**10, 1.0))
    assert_trees_close(found, expected, 1e-13)


# With Flax's dynamic scale.


def train_step(tx: Any, params: Any, state: Any, dynamic: Any, batch: Any) -> Any:
    """One step as the documentation of `Objective` has it, with the scale that Flax adapts."""
    value_fn = tiny_objective(jnp.float16).on(batch)
    scaled, finite, loss, grads = dynamic.value_and_grad(value_fn)(params)
    value_fn = tiny_objective(jnp.float16, scale=dynamic.scale).on(batch)
    updates, new_state = tx.update(grads, state, params, value_fn=value_fn, value=loss)
    # The second pass may overflow where the first did not.
    whole = jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(updates)]).all()
    lower = dynamic.replace(scale=dynamic.scale * dynamic.backoff_factor, fin_steps=0)
    scaled = jax.tree.map(lambda a, b: jnp.where(finite & ~whole, b, a), scaled, lower)
    keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite & whole, a, b), new, old)
    params = keep(optax.apply_updates(params, updates), params)
    return params, keep(new_state, state), scaled, finite & whole


def test_dynamic_scale_falls_until_sam_trains_as_in_float64():
    tx = cx.sam(optax.sgd(2.0**20, 0.9), 0.1)
    params, state = in_single(PARAMS), tx.init(in_single(PARAMS))
    step = jax.jit(partial(train_step, tx))
    dynamic, finite = DynamicScale(scale=jnp.float32(2.0**45), fin_steps=jnp.int32(0)), False
    scales = []
    while not finite:
        before = params
        params, state, dynamic, finite = step(params, state, dynamic, BATCH)
        scales.append(float(dynamic.scale))
        if not finite:
            assert_trees_close(params, before, 0)
            assert int(optax.tree.get(state, "step")) == 0
    assert len(scales) > 3
    assert scales[:-1] == [2.0 ** (44 - i) for i in range(len(scales) - 1)]
    value_fn = tiny_objective(jnp.float64)
    _, grads = value_fn.value_and_grad(in_single(PARAMS))
    expected, _ = tx.update(grads, tx.init(in_single(PARAMS)), in_single(PARAMS), value_fn=value_fn)
    moved = jax.tree.map(lambda a, b: a - b, params, in_single(PARAMS))
    assert relative(moved, expected) < 5e-3


def test_apply_if_finite_after_sam_skips_a_step_that_overflows():
    tx = cx.sam(optax.apply_if_finite(optax.sgd(0.1, 0.9), 3), 0.1)
    single = in_single(PARAMS)
    value_fn = tiny_objective(jnp.float16, scale=2.0**60)
    grads = HALF["gradient"](tiny_objective(jnp.float64), single)
    updates, state = tx.update(grads, tx.init(single), single, value_fn=value_fn)
    assert not any(map(jnp.any, jax.tree.leaves(updates)))
    assert not optax.tree.get(state, "last_finite")
    assert not any(map(jnp.any, jax.tree.leaves(optax.tree.get(state, "trace"))))


@pytest.mark.parametrize(
    ("scale", "error"),
    [
        (0.0, ValueError), (-1.0, ValueError), (float("inf"), ValueError),
        (float("nan"), ValueError), (jnp.ones(3), TypeError), ("8", TypeError), (True, TypeError),
    ],
)  # fmt: skip
def test_invalid_scale_is_refused(scale, error):
    with pytest.raises(error, match=r"`Objective\(scale=\)` multiplies the loss"):
        objective("likelihood", scale=scale)
