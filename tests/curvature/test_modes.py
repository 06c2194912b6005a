"""Second derivatives where JAX refuses some: kernels, implicit layers, callbacks."""

import functools
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from refusing_layers import fixed_point, kernel, masked, on_host, unrolled
from small_problems import flat, quick_jit

import curvax as cx
from curvax import analysis
from curvax.curvature.differentiability import refusal
from curvax.curvature.hessian import MODES
from curvax.objective import value_aux_and_grad

X = jax.random.normal(jax.random.key(0), (8, 3))
W = {"w": 0.3 * jax.random.normal(jax.random.key(1), (3, 3))}
V = {"w": jax.random.normal(jax.random.key(2), (3, 3))}
BATCH = {"x": X, "y": jnp.ones(8)}
SPLITS = "JAX cannot differentiate"
# Central differences of gradients in float64; the fixed points settle to 1e-13.
NEAR: Any = dict(rtol=1e-6, atol=1e-8)


# (a layer that refuses, the same function in plain JAX)
PAIRS: dict[str, tuple[Callable[..., jax.Array], Callable[..., jax.Array]]] = {
    "kernel": (lambda w, x: kernel(x @ w), lambda w, x: jnp.tanh(x @ w)),
    "masked kernel": (lambda w, x: masked(x @ w), lambda w, x: jnp.tanh(x @ w)),
    "implicit": (fixed_point, unrolled),
    "callback": (lambda w, x: on_host(x @ w), lambda w, x: jnp.tanh(x @ w)),
}


def whole(f: Any, **options: Any) -> cx.Objective:
    loss = lambda p, b: jnp.mean((f(p["w"], b["x"]).sum(1) - b["y"]) ** 2)
    return cx.Objective(loss, BATCH, **options)


def split(f: Any, loss: Any = None, **options: Any) -> cx.Objective:
    model = lambda p, b: f(p["w"], b["x"]).sum(1)
    return cx.Objective(loss or cx.gaussian("y"), BATCH, model=model, **options)


@pytest.fixture(autouse=True)
def silent(request: Any) -> Iterator[None]:
    """Ignores warnings of finite differences, except in the tests of warnings."""
    with warnings.catch_warnings():
        if "warn" not in request.node.name:
            warnings.filterwarnings("ignore", message=SPLITS)
        yield


def updates(tx: Any, objective: cx.Objective) -> Any:
    def run(params: Any) -> Any:
        value, grads = objective.value_and_grad(params)
        return tx.update(grads, tx.init(params), params, value_fn=objective, value=value)[0]

    return quick_jit(run)(W)


def eigenvalue(objective: cx.Objective, **options: Any) -> jax.Array:
    return analysis.top_eigenpairs(objective, W, k=1, key=3, **options).values


MADE_OF_HESSIANS: dict[str, Callable[[cx.Objective], Any]] = {
    "hvp": lambda o: quick_jit(lambda p, v: cx.hvp(o, p)(v))(W, V),
    "eager": lambda o: cx.hvp(o, W)(V),
    "adahessian": lambda o: updates(cx.adahessian(0.1), o),
    "several probes": lambda o: updates(cx.adahessian(0.1, probes=3), o),
    "sophia": lambda o: updates(cx.sophia_h(0.1), o),
    "newton": lambda o: updates(cx.newton_cg(damping=1.0), o),
    "trust region": lambda o: updates(cx.newton_cg(solver=cx.steihaug(0.1)), o),
    "second order": lambda o: updates(cx.sam(optax.sgd(0.1), 0.1, second_order=True), o),
    "exact": lambda o: updates(cx.exact_diag() | cx.scale_by_power(1.0), o),
    "eigenvalue": eigenvalue,
    "density": lambda o: analysis.hessian_spectrum(o, W, probes=2, steps=3).largest,
    "trace": lambda o: analysis.curvature_trace(o, W, probes=2).mean,
    "blocks": lambda o: analysis.block_eigenvalues(o, W)["w"].value,
}


SEEN_ON_KERNELS = ("hvp", "several probes", "newton", "density")


@pytest.mark.parametrize(
    ("what", "name"),
    [
        *(("implicit", name) for name in MADE_OF_HESSIANS),
        *(("kernel", name) for name in SEEN_ON_KERNELS),
    ],
)
def test_hessian_methods_and_measures_pass_through_refusing_layers(what, name):
    fast, slow = PAIRS[what]
    found, expected = (MADE_OF_HESSIANS[name](whole(f)) for f in (fast, slow))
    np.testing.assert_allclose(flat(found), flat(expected), **NEAR)


@pytest.mark.parametrize("microbatch", [None, 4])
@pytest.mark.parametrize("what", PAIRS)
def test_hvp_passes_through_refusing_layers(what, microbatch):
    fast, slow = (whole(f, microbatch=microbatch) for f in PAIRS[what])
    np.testing.assert_allclose(cx.hvp(fast, W)(V)["w"], cx.hvp(slow, W)(V)["w"], **NEAR)


MATRICES: dict[str, Callable[..., Any]] = {
    "ggnvp": cx.ggnvp,
    "fvp": cx.fvp,
    "sampled": functools.partial(cx.fvp, samples=2, key=jax.random.key(5)),
    "empirical_fvp": cx.empirical_fvp,
}


@pytest.mark.parametrize(
    ("what", "name", "microbatch"),
    [
        *(("implicit", name, None) for name in MATRICES),
        *((what, "ggnvp", None) for what in PAIRS if what != "implicit"),
        ("kernel", "ggnvp", 4),
        ("implicit", "empirical_fvp", 4),
    ],
)
def test_gauss_newton_and_fisher_products_pass_through_refusing_layers(what, name, microbatch):
    product = lambda f: MATRICES[name](split(f, microbatch=microbatch), W)(V)["w"]
    found, expected = map(product, PAIRS[what])
    np.testing.assert_allclose(found, expected, **NEAR)


@pytest.mark.parametrize(
    "tx",
    [
        cx.gauss_newton(damping=1.0),
        cx.natural_gradient(damping=1.0, solver=cx.row_space()),
        cx.hessian_free(),
        cx.sophia_g(0.1),
        cx.gauss_newton_diag() | cx.scale_by_power(1.0, damping=1.0),
        cx.sam(optax.sgd(0.1), 0.1, ascent=cx.fisher_ascent()),
    ],
    ids=["gauss_newton", "row space", "hessian_free", "sophia_g", "diagonal", "ascent"],
)
def test_gauss_newton_and_fisher_methods_pass_through_an_implicit_layer(tx):
    found, expected = (updates(tx, split(f)) for f in PAIRS["implicit"])
    np.testing.assert_allclose(flat(found), flat(expected), **NEAR)


def test_gauss_newton_product_passes_through_a_kernel_in_the_loss():
    loss = lambda act: lambda z, b: jnp.mean(act(z - b["y"]) ** 2)
    plain = lambda w, x: jnp.sin(x @ w)
    product = lambda act: cx.ggnvp(split(plain, loss(act)), W)(V)["w"]
    np.testing.assert_allclose(product(kernel), product(jnp.tanh), **NEAR)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_gauss_newton_gives_the_same_product(mode):
    plain = PAIRS["kernel"][1]
    exponential = lambda z, b: jnp.mean(jnp.exp(z) - b["y"] * z)
    for objective in (split(plain), split(plain, exponential)):
        expected = quick_jit(lambda v, o=objective: cx.ggnvp(o, W)(v))(V)["w"]
        found = quick_jit(lambda v, o=objective: cx.ggnvp(o, W, mode=mode)(v))(V)["w"]
        np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("mode", ["reverse-over-reverse", "finite-differences"])
def test_methods_pass_their_mode_to_the_products(mode):
    plain = split(PAIRS["kernel"][1])
    methods: list[Callable[..., Any]] = [
        functools.partial(cx.adahessian, 0.1),
        functools.partial(cx.sophia_h, 0.1),
        functools.partial(cx.newton_cg, damping=1.0),
        functools.partial(cx.gauss_newton, damping=1.0),
        functools.partial(cx.natural_gradient, damping=1.0),
        cx.hessian_free,
        functools.partial(cx.sam, optax.sgd(0.1), 0.1, second_order=True),
        lambda mode: cx.exact_diag("fisher", mode=mode) | cx.scale_by_power(1.0, damping=1.0),
    ]
    program = lambda tx: str(
        jax.make_jaxpr(lambda p: tx.update(p, tx.init(p), p, value_fn=plain)[0])(W)
    )
    for method in methods:
        assert program(method(mode=mode)) != program(method(mode="auto"))
        with pytest.raises(ValueError, match="`mode` is one of"):
            method(mode="backward")


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton", "fisher", "empirical_fisher"])
def test_analysis_takes_a_mode(curvature):
    plain = split(PAIRS["kernel"][1])
    expected = eigenvalue(plain, curvature=curvature)
    for mode in MODES[1:]:
        found = eigenvalue(plain, curvature=curvature, mode=mode)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="partial"):
        eigenvalue(plain, curvature=cx.hvp, mode="finite-differences")
    with pytest.raises(ValueError, match="`mode` is one of"):
        eigenvalue(plain, mode="forward")


def test_mlp_block_hessians_pass_through_kernels():
    params = {f"l{n}": {"kernel": W["w"], "bias": jnp.full(3, 0.1)} for n in range(2)}

    def blocks(act: Any, **options: Any) -> Any:
        dense = lambda p, x: x @ p["kernel"] + p["bias"][None]
        model = lambda p, b: dense(p["l1"], act(dense(p["l0"], b["x"])))
        objective = cx.Objective(lambda z, b: jnp.mean(jnp.sin(z)), BATCH, model=model)
        found = analysis.mlp_block_hessians(
            objective, params, ["l0", "l1"], "x", activation=act, **options
        )
        return {name: block.hessian for name, block in found.items()}

    expected = flat(blocks(jnp.tanh))
    for act, options in ((kernel, {}), (jnp.tanh, dict(mode="finite-differences"))):
        np.testing.assert_allclose(flat(blocks(act, **options)), expected, rtol=1e-5, atol=1e-7)


def test_hvp_passes_through_an_implicit_layer_under_shard_map():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(w: Any, v: Any, batch: Any) -> Any:
        product = lambda f: cx.hvp(whole(f).on(batch), w)(v)["w"]
        return tuple(jax.lax.pmean(product(f), "data") for f in PAIRS["implicit"])

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=(P(), P()))
    found, expected = quick_jit(mapped)(W, V, BATCH)
    np.testing.assert_allclose(found, expected, **NEAR)


# Warnings and errors.


def test_falling_back_to_finite_differences_warns_with_the_obstacle():
    fast = PAIRS["implicit"][0]
    for act in (lambda: cx.hvp(whole(fast), W), lambda: cx.ggnvp(split(fast), W)(V)):
        with pytest.warns(UserWarning, match=rf"{SPLITS}.*\(.*\).*finite-differences"):
            act()


def test_no_warning_where_derivatives_are_exact_or_differences_were_asked_for():
    fast = PAIRS["implicit"][0]
    cx.hvp(whole(PAIRS["kernel"][0]), W)(V)
    cx.hvp(whole(fast), W, mode="finite-differences")(V)
    cx.ggnvp(split(fast), W, mode="finite-differences")(V)
    cx.fisher_diag()
    updates(cx.sophia_g(0.1), split(fast))  # which pulls alone


@pytest.mark.parametrize("mode", ["forward-over-reverse", "reverse-over-reverse"])
def test_mode_that_jax_refuses_raises_with_the_others(mode):
    fast = PAIRS["implicit"][0]
    for act in (
        lambda: cx.hvp(whole(fast), W, mode=mode),
        lambda: cx.ggnvp(split(fast), W, mode=mode)(V),
        lambda: cx.empirical_fvp(whole(fast), W, mode=mode)(V),
        lambda: updates(cx.newton_cg(mode=mode), whole(fast)),
    ):
        with pytest.raises(TypeError, match=rf"{mode}.*auto.*finite-differences"):
            act()


def test_error_of_the_callers_derivative_passes_unchanged():
    @jax.custom_vjp
    def broken(x: jax.Array) -> jax.Array:
        return x

    def backward(_: Any, g: jax.Array) -> Any:
        raise NotImplementedError("mine")

    broken.defvjp(lambda x: (x, None), backward)
    for act in (
        lambda: cx.hvp(whole(lambda w, x: broken(x @ w)), W),
        lambda: cx.ggnvp(split(lambda w, x: broken(x @ w)), W)(V),
    ):
        with pytest.raises(NotImplementedError, match="mine"):
            act()


def test_hvp_of_a_kernel_runs_no_extra_pass():
    """One gradient and one push for each product: the trial adds nothing to the program."""
    names = lambda f: re.findall(r"pallas_call\[", str(jax.make_jaxpr(f)(W, V)))
    fast = whole(PAIRS["kernel"][0])
    grad = lambda p: value_aux_and_grad(fast, p)[1]
    pushed = names(lambda p, v: jax.jvp(grad, (p,), (v,))[1])
    assert len(names(lambda p, v: cx.hvp(fast, p)(v))) == len(pushed) + len(
        names(lambda p, v: grad(p))
    )


def test_refusal_at_lowering_is_found():
    grad = jax.grad(lambda p: jnp.sum(masked(X @ p["w"]) ** 2))
    pushed = lambda p: jax.jvp(grad, (p,), (p,))[1]
    jax.make_jaxpr(pushed)(W)
    assert "safe_zip" in refusal(pushed, W)
