"""FLOPs, memory and traces of curvature products."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from products import LOSS, PRODUCTS, batch_of
from small_problems import net, net_params, quick_jit

import curvax as cx
from curvax.curvature.gauss_newton import model_pass
from curvax.likelihoods import Likelihood, categorical

# Cost.


def wide_net(params: Any, batch: Any) -> jax.Array:
    x = batch["x"]
    for w in params[:-1]:
        x = jnp.tanh(x @ w)
    return x @ params[-1]


def flops(f: Any, *args: Any) -> float:
    costs: Any = quick_jit(f).lower(*args).compile().cost_analysis()
    return costs["flops"]


@pytest.fixture(scope="module")
def wide() -> Any:
    kernels = [(64, 128), (128, 128), (128, 128), (128, 10)]
    shapes = [jax.ShapeDtypeStruct(kernel, jnp.float32) for kernel in kernels]
    batch = {
        "x": jax.ShapeDtypeStruct((64, 64), jnp.float32),
        "y": jax.ShapeDtypeStruct((64,), jnp.int32),
    }
    objective = lambda batch: cx.Objective(categorical("y"), batch, model=wide_net)
    gradient = flops(lambda p, b: objective(b).value_and_grad(p), shapes, batch)
    return objective, shapes, batch, gradient


def applications(product: Any, objective: Any, count: int) -> Any:
    """(parameters, vectors, batch) ↦ several products of one linearisation."""

    def f(params: Any, vectors: Any, batch: Any) -> Any:
        apply = product(objective(batch), params)
        return [apply(v) for v in vectors[:count]]

    return f


@pytest.mark.parametrize("name", ["ggnvp", "drawn"])
def test_one_more_product_costs_at_most_1_4_gradients(name, wide):
    objective, shapes, batch, gradient = wide
    cost = lambda count: flops(
        applications(PRODUCTS[name], objective, count), shapes, [shapes] * 3, batch
    )
    # Of shared residuals the first product brings one forward pass, the others none.
    assert cost(3) - cost(2) < 1.4 * gradient
    assert cost(3) < (0.4 + 3 * 1.4) * gradient


def test_pulling_noise_with_the_gradient_costs_at_most_1_7_gradients(wide):
    objective, shapes, batch, gradient = wide

    def diagonal(params: Any, batch: Any) -> Any:
        whole = model_pass(objective(batch), params)
        likelihood = whole.objective.loss
        assert isinstance(likelihood, Likelihood)
        noise = likelihood.root(whole.outputs, batch, jnp.ones_like(whole.outputs))
        return whole.loss_and_gradient(), whole.pull(noise)

    assert flops(diagonal, shapes, batch) < 1.7 * gradient


@pytest.mark.parametrize("name", ["ggnvp", "drawn", "empirical"])
def test_memory_over_microbatches_does_not_grow_with_the_batch(name):
    kernels = [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 4

    def memory(examples: int) -> float:
        batch = {
            "x": jax.ShapeDtypeStruct((examples, 64), jnp.float32),
            "y": jax.ShapeDtypeStruct((examples,), jnp.int32),
        }

        def product(params: Any, v: Any, batch: Any) -> Any:
            objective = cx.Objective(categorical("y"), batch, model=wide_net, microbatch=32)
            return PRODUCTS[name](objective, params)(v)

        analysis: Any = quick_jit(product).lower(kernels, kernels, batch).compile()
        return analysis.memory_analysis().temp_size_in_bytes

    # What grows is a key of 8 bytes for each of three draws; one layer's activations take 256.
    assert memory(1024) - memory(128) <= (1024 - 128) * 3 * 8


def test_the_model_is_traced_once_for_many_products():
    traces: list[None] = []

    def counted(params: Any, batch: Any) -> jax.Array:
        traces.append(None)
        return net(params, batch)

    for name in ("ggnvp", "drawn", "empirical"):
        product = PRODUCTS[name](cx.Objective(LOSS, batch_of(), model=counted), net_params())
        before = len(traces)
        for factor in (1.0, 2.0):
            product(jax.tree.map(lambda x, c=factor: c * x, net_params()))
        assert len(traces) == before, name
    assert len(traces) == 3
