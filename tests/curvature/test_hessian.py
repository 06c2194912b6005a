"""Hessian products against dense matrices, in every mode."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from small_problems import dense_hessian, flat, net_batch, net_loss, net_params, quick_jit

import curvax as cx
from curvax.curvature.hessian import MODES
from curvax.objective import value_and_aux

# Central differences err by about (2e-16)^(2/3) of the product, linear maps by rounding.
TOLERANCE = {mode: 1e-8 if mode == "finite-differences" else 1e-12 for mode in MODES}


def loss_of_params(params: Any) -> jax.Array:
    return net_loss(params, net_batch())


@pytest.fixture(scope="module")
def hessian() -> np.ndarray:
    return dense_hessian(loss_of_params, net_params())


def matrix_of(product: Any, like: Any) -> np.ndarray:
    """The matrix of a linear map, a column for each unit tree."""
    point, unravel = ravel_pytree(like)
    columns = jax.vmap(lambda v: ravel_pytree(product(unravel(v)))[0])(jnp.eye(point.size))
    return np.asarray(columns).T


@pytest.mark.parametrize("microbatch", [None, 2])
@pytest.mark.parametrize("mode", MODES)
def test_hvp_equals_the_dense_matrix(mode, microbatch, hessian):
    def matrix(params: Any, batch: Any) -> Any:
        objective = cx.Objective(net_loss, batch, microbatch=microbatch)
        point, unravel = ravel_pytree(params)
        product = cx.hvp(objective, params, mode=mode)
        return jax.vmap(lambda v: ravel_pytree(product(unravel(v)))[0])(jnp.eye(point.size))

    columns = quick_jit(matrix)(net_params(), net_batch())
    np.testing.assert_allclose(columns.T, hessian, rtol=0, atol=TOLERANCE[mode])


def test_hvp_of_a_plain_callable_equals_the_dense_matrix(hessian):
    v = jax.tree.map(jnp.cos, net_params())
    product = cx.hvp(loss_of_params, net_params())(v)
    np.testing.assert_allclose(flat(product), hessian @ flat(v), rtol=1e-12)


def test_hvp_of_a_weighted_keyed_loss_with_aux_equals_the_dense_matrix():
    def loss(params: Any, batch: Any, key: jax.Array) -> Any:
        kept = batch["mask"] * jax.random.bernoulli(key, 0.7, batch["mask"].shape)
        values = jnp.sin(batch["x"] @ params) ** 2
        return jnp.sum(kept * values) / jnp.sum(batch["mask"]), {"kept": jnp.sum(kept)}

    params, x = jnp.array([0.3, -0.8]), jax.random.normal(jax.random.key(2), (6, 2))
    batch = {"x": x, "mask": jnp.array([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])}
    options: Any = dict(has_aux=True, key=jax.random.key(3), weight="mask")
    whole = cx.Objective(loss, batch, **options)
    pieces = cx.Objective(loss, batch, microbatch=2, **options)

    def mean(params: Any) -> Any:
        parts = [
            whole.piece(jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], batch), i, 3)
            for i in range(3)
        ]
        weighted = [jnp.sum(part.batch["mask"]) * value_and_aux(part, params)[0] for part in parts]
        return sum(weighted) / jnp.sum(batch["mask"])

    expected = quick_jit(jax.hessian(mean))(params)
    np.testing.assert_allclose(matrix_of(cx.hvp(pieces, params), params), expected, rtol=1e-12)


def test_hvp_keeps_the_dtypes_of_the_parameters():
    params, batch = net_params(jnp.float32), net_batch(dtype=jnp.float32)
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    for mode in MODES:
        shape = jax.eval_shape(cx.hvp(cx.Objective(net_loss, batch), params, mode=mode), wide)
        assert {x.dtype for x in jax.tree.leaves(shape)} == {jnp.dtype(jnp.float32)}


def test_the_loss_is_linearised_once_for_many_products():
    traces: list[None] = []

    def loss(params: Any) -> jax.Array:
        traces.append(None)
        return loss_of_params(params)

    product = cx.hvp(loss, net_params())
    before = len(traces)
    for factor in (1.0, 2.0, 3.0):
        product(jax.tree.map(lambda x, c=factor: c * x, net_params()))
    assert len(traces) == before


# x² by a custom rule whose backward pass is itself one: forward mode cannot enter it.


@jax.custom_vjp
def doubled(x: jax.Array) -> jax.Array:
    return 2 * x


doubled.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))


@jax.custom_vjp
def square(x: jax.Array) -> jax.Array:
    return x * x


square.defvjp(lambda x: (x * x, x), lambda x, g: (g * doubled(x),))


def blocked_loss(params: Any, batch: Any) -> jax.Array:
    return jnp.mean(square(jnp.sin(batch @ params)))


def open_loss(params: Any, batch: Any) -> jax.Array:
    return jnp.mean(jnp.sin(batch @ params) ** 2)


POINT = jnp.array([0.3, -0.8])
INPUTS = jax.random.normal(jax.random.key(2), (4, 2))


@pytest.mark.parametrize("microbatch", [None, 2])
def test_reverse_over_reverse_is_chosen_where_forward_mode_is_blocked(microbatch):
    objective = cx.Objective(blocked_loss, INPUTS, microbatch=microbatch)
    expected = jax.hessian(open_loss)(POINT, INPUTS)
    for mode in ("auto", "reverse-over-reverse"):
        product = jax.jit(lambda v, mode=mode: cx.hvp(objective, POINT, mode=mode)(v))
        np.testing.assert_allclose(matrix_of(product, POINT), expected, rtol=1e-12)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jit(lambda v: cx.hvp(objective, POINT, mode="forward-over-reverse")(v))(POINT)


def test_forward_mode_is_kept_where_a_custom_rule_can_be_differentiated():
    def once(params: Any) -> jax.Array:
        return jnp.sum(doubled(jnp.sin(params)) ** 2)

    program = lambda mode: str(jax.make_jaxpr(cx.hvp(once, POINT, mode=mode))(POINT))
    assert program("auto") == program("forward-over-reverse") != program("reverse-over-reverse")


def implicit(p: jax.Array, b: jax.Array) -> jax.Array:
    """x of (I + ppᵀ) x = b, settled by a loop."""
    product = lambda x: x + p * (p @ x)

    def settle(f: Any, b: jax.Array) -> jax.Array:
        nearer = lambda s: (s[0] + 1, s[1] + (b - f(s[1])) / 2)
        return jax.lax.while_loop(lambda s: s[0] < 60, nearer, (0, b))[1]

    return jax.lax.custom_linear_solve(product, b, settle, symmetric=True)


def explicit(p: jax.Array, b: jax.Array) -> jax.Array:
    return b - p * (p @ b) / (1 + p @ p)


@pytest.mark.parametrize("oracle", [cx.hvp, cx.ggnvp])
def test_forward_mode_is_kept_through_an_implicit_layer(oracle):
    def product(layer: Any, mode: str) -> Any:
        model = lambda p, batch: jax.vmap(lambda b: layer(p, b))(batch)
        loss = lambda z, batch: jnp.mean(jnp.sum(z**4, -1))
        objective = cx.Objective(loss, INPUTS, model=model)
        return lambda v: oracle(objective, POINT, mode=mode)(v)

    expected = matrix_of(jax.jit(product(explicit, "auto")), POINT)
    for mode in ("auto", "forward-over-reverse"):
        found = matrix_of(jax.jit(product(implicit, mode)), POINT)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_stages_run_on_a_loss_that_blocks_forward_mode():
    def step(loss: Any, tx: cx.Stage) -> Any:
        objective = cx.Objective(loss, INPUTS)
        run = lambda p: tx.update(p, tx.init(p), p, value_fn=objective)[0]
        return quick_jit(run)(POINT)

    for tx in (
        cx.hutchinson_diag() | cx.scale_by_power(1.0),
        cx.hutchinson_diag(probes=2) | cx.scale_by_power(1.0),
        cx.sam_perturb(0.3, second_order=True),
    ):
        np.testing.assert_allclose(step(blocked_loss, tx), step(open_loss, tx), rtol=1e-12)


def test_error_of_the_loss_passes_unchanged():
    def broken(params: Any) -> jax.Array:
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        cx.hvp(broken, POINT)


def test_unknown_mode_raises_with_the_known_ones():
    for act in (
        lambda: cx.hvp(jnp.sum, POINT, mode="forward"),
        lambda: cx.hutchinson_diag(mode="forward"),
    ):
        with pytest.raises(ValueError, match=r"finite-differences.*'forward'"):
            act()


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_finite_differences_do_not_depend_on_the_length_of_the_vector(size):
    v = size * jnp.array([1.0, 2.0])
    product = cx.hvp(lambda p: open_loss(p, INPUTS), POINT, mode="finite-differences")(v)
    expected = jax.hessian(open_loss)(POINT, INPUTS) @ v
    np.testing.assert_allclose(product / size, expected / size, rtol=0, atol=1e-9)


def test_finite_differences_along_a_zero_vector_are_zero():
    product = cx.hvp(lambda p: open_loss(p, INPUTS), POINT, mode="finite-differences")
    np.testing.assert_array_equal(product(jnp.zeros(2)), jnp.zeros(2))
