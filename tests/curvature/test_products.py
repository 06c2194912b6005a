"""Curvature products: roots, gradients, dtypes, precision and errors."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from products import KEY, LOSS, PRODUCTS, applied, batch_of, direction, every_product
from small_problems import assert_trees_close, flat, net, net_params, quick_jit

import curvax as cx
from curvax.curvature import (
    empirical_fvp,
    fvp,
    ggnvp,
    linearized_empirical_fisher,
    linearized_fisher,
    linearized_gauss_newton,
    linearized_hessian,
)
from curvax.curvature.gauss_newton import model_pass
from curvax.objective import value_aux_and_grad

# Roots.


@pytest.mark.parametrize("name", ["ggnvp", "fvp", "drawn", "empirical"])
def test_root_times_its_transpose_is_the_product(name):
    objective, params = cx.Objective(LOSS, batch_of(), model=net), net_params()
    point, unravel = ravel_pytree(params)
    product = PRODUCTS[name](objective, params)
    root = product.root
    forward = lambda v: ravel_pytree(root.forward(unravel(v)))[0]
    rows = quick_jit(jax.vmap(forward, out_axes=1))(jnp.eye(point.size))
    columns = quick_jit(jax.vmap(lambda e: ravel_pytree(product(unravel(e)))[0]))(
        jnp.eye(point.size)
    )
    np.testing.assert_allclose(rows.T @ rows, columns, rtol=0, atol=1e-14)
    u = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size) * 1.0).reshape(x.shape), root.rows)
    pulled = rows.T @ ravel_pytree(u)[0]
    np.testing.assert_allclose(flat(root.transpose(u)), pulled, rtol=0, atol=1e-14)
    assert jax.eval_shape(root.forward, params) == root.rows


# The pass that comes with a product.

LINEARIZED: dict[str, Any] = {
    "hvp": linearized_hessian,
    "ggnvp": linearized_gauss_newton,
    "fvp": linearized_fisher,
    "drawn": partial(linearized_fisher, samples=3, key=KEY),
    "empirical": linearized_empirical_fisher,
}


def net_and_top(params: Any, batch: Any, key: jax.Array) -> Any:
    """Outputs under dropout, and a statistic of the batch."""
    kept = jax.random.bernoulli(key, 0.8, batch["x"].shape)
    return net(params, dict(batch, x=batch["x"] * kept)), {"top": jnp.max(batch["x"])}


@pytest.mark.parametrize("microbatch", [None, 2])
@every_product
def test_linearization_returns_the_gradient_with_the_product(name, microbatch):
    options: Any = dict(has_aux=True, key=jax.random.key(3), microbatch=microbatch)
    objective = cx.Objective(LOSS, batch_of(), model=net_and_top, **options)

    def both(params: Any) -> Any:
        out, product = LINEARIZED[name](objective, params)
        return out, product(direction(params))

    out, product = quick_jit(both)(net_params())
    assert_trees_close(out, value_aux_and_grad(objective, net_params()), tol=1e-14)
    assert_trees_close(product, applied(name, objective), tol=1e-14)


def test_model_pass_gives_outputs_and_pulls_back_their_cotangents():
    objective, params = cx.Objective(LOSS, batch_of(), model=net), net_params()
    whole = model_pass(objective, params)
    assert_trees_close(whole.outputs, net(params, batch_of()), tol=1e-15)
    cotangent = jnp.cos(whole.outputs)
    expected = jax.vjp(lambda p: net(p, batch_of()), params)[1](cotangent)[0]
    assert_trees_close(whole.pull(cotangent), expected, tol=1e-14)


# Models that JAX cannot enter forwards.


@jax.custom_vjp
def blocked_tanh(x: jax.Array) -> jax.Array:
    return jnp.tanh(x)


blocked_tanh.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g * (1 - blocked_tanh(x) ** 2),))


def blocked_net(params: Any, batch: Any) -> jax.Array:
    hidden = batch["x"] @ params["hidden"]["kernel"] + params["hidden"]["bias"][None, :]
    return blocked_tanh(hidden) @ params["out"]["kernel"]


def deep_net(params: Any, batch: Any, wrap: Any) -> jax.Array:
    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(x @ w), None

    x, _ = jax.lax.scan(wrap(layer), batch["x"], params["layers"])
    return x @ params["out"]


@pytest.mark.parametrize("microbatch", [None, 2])
@every_product
def test_products_pass_through_a_custom_vjp_in_the_model(name, microbatch):
    options: Any = dict(microbatch=microbatch)
    blocked = cx.Objective(LOSS, batch_of(), model=blocked_net, **options)
    expected = applied(name, cx.Objective(LOSS, batch_of(), model=net, **options))
    assert_trees_close(applied(name, blocked), expected, tol=1e-13)


@pytest.mark.parametrize("name", ["ggnvp", "empirical"])
def test_rematerialised_layers_give_the_same_product(name):
    layers = 0.5 * jax.random.normal(KEY, (3, 4, 4), jnp.float64)
    params = {"layers": layers, "out": layers[0, :, :2]}
    of = lambda wrap: cx.Objective(LOSS, batch_of(), model=partial(deep_net, wrap=wrap))
    found = applied(name, of(jax.checkpoint), params)
    assert_trees_close(found, applied(name, of(lambda f: f), params), tol=1e-14)


# Dtypes and structures.


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@every_product
def test_products_keep_the_dtypes_of_the_parameters(name, dtype):
    params = net_params(dtype)
    for microbatch in (None, 2):
        objective = cx.Objective(LOSS, batch_of(dtype=dtype), model=net, microbatch=microbatch)
        product = lambda p, o=objective: PRODUCTS[name](o, p)(net_params(jnp.float64))
        found = jax.eval_shape(product, params)
        assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(lambda x: x.dtype, params)


@every_product
def test_none_leaves_and_empty_trees_pass_through_products(name):
    with_none = lambda params, batch: net(params["net"], batch)
    params = {"net": net_params(), "none": None}
    found = applied(name, cx.Objective(LOSS, batch_of(), model=with_none), params)
    assert found["none"] is None
    constant = lambda params, batch: batch["x"][:, :2]
    empty = cx.Objective(LOSS, batch_of(), model=constant)
    assert PRODUCTS[name](empty, {})({}) == {}


@pytest.mark.parametrize("microbatch", [None, 2])
@every_product
def test_precision_applies_to_every_matrix_product(name, microbatch):
    params = net_params(jnp.float32)
    batch = batch_of(dtype=jnp.float32)
    objective = cx.Objective(LOSS, batch, model=net, microbatch=microbatch)
    for precision in ("highest", "default"):
        product = lambda v, p=precision: PRODUCTS[name](objective, params, precision=p)(v)
        program = str(jax.make_jaxpr(product)(params))
        asked_for = program.count(f"precision=(Precision.{precision.upper()}")
        assert program.count("dot_general[") == asked_for > 0


# Errors.


def told(error: Any, *words: str) -> Any:
    return pytest.raises(error, match="(?s)" + ".*".join(words))


@pytest.mark.parametrize("product", [ggnvp, fvp])
def test_products_need_model_and_loss_as_two_functions(product):
    loss = lambda params, batch: jnp.mean(net(params, batch) ** 2)
    for objective in (cx.Objective(loss, batch_of()), lambda params: jnp.sum(params["out"] ** 2)):
        with told(ValueError, "two functions", "model=predict", "categorical"):
            product(objective, net_params())


def test_fisher_product_needs_a_likelihood():
    loss = lambda outputs, batch: jnp.mean(outputs**2)
    objective = cx.Objective(loss, batch_of(), model=net)
    with told(ValueError, "expectation", "categorical", "ggnvp", "empirical_fvp"):
        fvp(objective, net_params())


def test_the_empirical_fisher_needs_a_batch():
    with told(ValueError, "empirical_fvp", r"Objective\(loss, batch\)"):
        empirical_fvp(lambda params: jnp.sum(params["out"]["kernel"]), net_params())


def test_conflicting_sampling_options_are_refused():
    objective = cx.Objective(LOSS, batch_of(), model=net)
    for error, options, words in (
        (ValueError, dict(samples=2), ("one of the two", "key=")),
        (ValueError, dict(key=KEY), ("one of the two", "exact")),
        (ValueError, dict(samples=0, key=KEY), ("samples", "positive")),
        (TypeError, dict(samples=1, key=0), ("fvp", "typed key")),
        (ValueError, dict(labels=batch_of()["y"], key=KEY), ("either", "labels")),
        (ValueError, dict(labels=jnp.zeros((2, 3), int)), (r"\[8\]", r"\[2, 3\]")),
    ):
        with told(error, *words):
            fvp(objective, net_params(), **options)


def test_a_vector_of_another_structure_is_refused():
    for name in PRODUCTS:
        product = PRODUCTS[name](cx.Objective(LOSS, batch_of(), model=net), net_params())
        with told(ValueError, "structure", "hidden"):
            product({"out": jnp.zeros(3)})
