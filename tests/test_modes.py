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
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P
from small_problems import flat, quick_jit

import curvax as cx
from curvax import analysis
from curvax.curvature.differentiability import refusal
from curvax.curvature.finite_differences import differences, largest_singular_value
from curvax.curvature.hessian import MODES
from curvax.curvature.working_precision import rounding
from curvax.objective import value_aux_and_grad

X = jax.random.normal(jax.random.key(0), (8, 3))
W = {"w": 0.3 * jax.random.normal(jax.random.key(1), (3, 3))}
V = {"w": jax.random.normal(jax.random.key(2), (3, 3))}
BATCH = {"x": X, "y": jnp.ones(8)}
SPLITS = "JAX cannot differentiate"
# Central differences of gradients in float64; the fixed points settle to 1e-13.
NEAR: Any = dict(rtol=1e-6, atol=1e-8)


def call(kernel: Any, *xs: jax.Array) -> jax.Array:
    shape = jax.ShapeDtypeStruct(xs[0].shape, xs[0].dtype)
    return pl.pallas_call(kernel, out_shape=shape, interpret=True)(*xs)


def forward_kernel(x: Any, out: Any) -> None:
    out[...] = jnp.tanh(x[...])


def backward_kernel(y: Any, g: Any, out: Any) -> None:
    out[...] = g[...] * (1 - y[...] ** 2)


def halving_kernel(x: Any, out: Any) -> None:
    @pl.when(x[0, 0] > 0)
    def _() -> None:
        out[...] = x[...].astype(jnp.bfloat16).astype(out.dtype)


@jax.custom_vjp
def kernel(x: jax.Array) -> jax.Array:
    """tanh by a kernel whose backward pass is one: JAX pushes vectors through it alone."""
    return call(forward_kernel, x)


def kernel_forward(x: jax.Array) -> Any:
    y = call(forward_kernel, x)
    return y, y


kernel.defvjp(kernel_forward, lambda y, g: (call(backward_kernel, y, g),))


def masked_kernel(x: Any, mask: Any, out: Any) -> None:
    out[...] = jnp.tanh(x[...]) * mask[...]


def masked_backward(x: Any, mask: Any, g: Any, out: Any) -> None:
    out[...] = g[...] * mask[...] * (1 - jnp.tanh(x[...]) ** 2)


@jax.custom_vjp
def masked(x: jax.Array) -> jax.Array:
    """tanh by a kernel with a constant operand: its derivative is traced, but cannot be lowered."""
    return call(masked_kernel, x, jnp.ones_like(x))


masked.defvjp(
    lambda x: (call(masked_kernel, x, jnp.ones_like(x)), x),
    lambda x, g: (call(masked_backward, x, jnp.ones_like(x), g),),
)


def settled(f: Callable[[jax.Array], jax.Array], z: jax.Array) -> jax.Array:
    go = lambda c: (jnp.max(jnp.abs(c[1] - c[0])) > 1e-13) & (c[2] < 90)
    step = lambda c: (c[1], f(c[1]), c[2] + 1)
    return jax.lax.while_loop(go, step, (z, f(z), 0))[1]


def layer(w: jax.Array, x: jax.Array, z: jax.Array) -> jax.Array:
    return jnp.tanh(0.3 * z @ w + x)


@jax.custom_vjp
def fixed_point(w: jax.Array, x: jax.Array) -> jax.Array:
    return settled(lambda z: layer(w, x, z), jnp.zeros_like(x))


def fixed_forward(w: jax.Array, x: jax.Array) -> Any:
    z = fixed_point(w, x)
    return z, (w, x, z)


def fixed_backward(saved: Any, cotangent: jax.Array) -> Any:
    w, x, z = saved
    pull = jax.vjp(lambda z: layer(w, x, z), z)[1]
    u = settled(lambda u: cotangent + pull(u)[0], jnp.zeros_like(cotangent))
    return jax.vjp(lambda w, x: layer(w, x, z), w, x)[1](u)


fixed_point.defvjp(fixed_forward, fixed_backward)


def unrolled(w: jax.Array, x: jax.Array) -> jax.Array:
    z = jnp.zeros_like(x)
    for _ in range(40):
        z = layer(w, x, z)
    return z


def host(f: Callable[..., Any], *xs: jax.Array) -> jax.Array:
    shape = jax.ShapeDtypeStruct(xs[0].shape, xs[0].dtype)
    return jax.pure_callback(f, shape, *xs, vmap_method="expand_dims")


@jax.custom_vjp
def on_host(x: jax.Array) -> jax.Array:
    """tanh outside of JAX: no derivative but the one that is given."""
    return host(np.tanh, x)


on_host.defvjp(
    lambda x: (on_host(x), x), lambda x, g: (host(lambda x, g: g * (1 - np.tanh(x) ** 2), x, g),)
)

# Each beside what it computes.
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
    """Warnings of differences are tested below; here the numbers are."""
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
def test_what_is_made_of_hessian_products(what, name):
    fast, slow = PAIRS[what]
    found, expected = (MADE_OF_HESSIANS[name](whole(f)) for f in (fast, slow))
    np.testing.assert_allclose(flat(found), flat(expected), **NEAR)


@pytest.mark.parametrize("microbatch", [None, 4])
@pytest.mark.parametrize("what", PAIRS)
def test_products_with_the_hessian(what, microbatch):
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
def test_products_with_gauss_newton_and_fisher(what, name, microbatch):
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
def test_methods_of_gauss_newton_and_fisher(tx):
    found, expected = (updates(tx, split(f)) for f in PAIRS["implicit"])
    np.testing.assert_allclose(flat(found), flat(expected), **NEAR)


def test_a_loss_by_a_kernel_behind_a_plain_model():
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
def test_methods_hand_their_mode_down(mode):
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


def test_block_hessians_of_a_perceptron_of_kernels():
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


def test_under_shard_map():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(w: Any, v: Any, batch: Any) -> Any:
        product = lambda f: cx.hvp(whole(f).on(batch), w)(v)["w"]
        return tuple(jax.lax.pmean(product(f), "data") for f in PAIRS["implicit"])

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=(P(), P()))
    found, expected = quick_jit(mapped)(W, V, BATCH)
    np.testing.assert_allclose(found, expected, **NEAR)


# What is said, and what comes through.


def test_differences_in_the_place_of_a_derivative_are_said_with_the_obstacle_and_warn():
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
def test_a_mode_that_jax_refuses_names_the_others(mode):
    fast = PAIRS["implicit"][0]
    for act in (
        lambda: cx.hvp(whole(fast), W, mode=mode),
        lambda: cx.ggnvp(split(fast), W, mode=mode)(V),
        lambda: cx.empirical_fvp(whole(fast), W, mode=mode)(V),
        lambda: updates(cx.newton_cg(mode=mode), whole(fast)),
    ):
        with pytest.raises(TypeError, match=rf"{mode}.*auto.*finite-differences"):
            act()


def test_an_error_of_the_callers_own_comes_through_from_every_pass():
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


def test_a_kernel_costs_no_pass_more_than_a_product_of_its_own():
    """One gradient and one push for each product: the trial leaves nothing in the program."""
    names = lambda f: re.findall(r"pallas_call\[", str(jax.make_jaxpr(f)(W, V)))
    fast = whole(PAIRS["kernel"][0])
    grad = lambda p: value_aux_and_grad(fast, p)[1]
    pushed = names(lambda p, v: jax.jvp(grad, (p,), (v,))[1])
    assert len(names(lambda p, v: cx.hvp(fast, p)(v))) == len(pushed) + len(
        names(lambda p, v: grad(p))
    )


def test_a_refusal_that_comes_with_the_lowering_is_found():
    grad = jax.grad(lambda p: jnp.sum(masked(X @ p["w"]) ** 2))
    pushed = lambda p: jax.jvp(grad, (p,), (p,))[1]
    jax.make_jaxpr(pushed)(W)
    assert "safe_zip" in refusal(pushed, W)


# Differences follow the precision.

SIZES = (20, 32, 32, 5)


def network() -> Any:
    keys = jax.random.split(jax.random.key(0), 3)
    kernels = [
        jax.random.normal(key, (n, m), jnp.float64) / np.sqrt(n)
        for key, n, m in zip(keys, SIZES, SIZES[1:])
    ]
    return [{"w": kernel, "b": jnp.zeros(kernel.shape[1])} for kernel in kernels]


def network_loss(params: Any, dtype: Any) -> jax.Array:
    x = jax.random.normal(jax.random.key(1), (64, SIZES[0])).astype(dtype)
    label = jax.random.randint(jax.random.key(2), (64,), 0, SIZES[-1])
    for number, p in enumerate(params):
        x = x @ p["w"].astype(dtype) + p["b"].astype(dtype)[None]
        x = x if number == 2 else jnp.tanh(x)
    x = x.astype(jnp.promote_types(dtype, jnp.float32))
    return optax.losses.softmax_cross_entropy_with_integer_labels(x, label).mean()


# Of the parameters, of the products, and a bound a little above what the docstring states.
KINDS = {
    "float64": (jnp.float64, jnp.float64, 2e-10),
    "float32": (jnp.float32, jnp.float32, 8e-5),
    "float16 in float32": (jnp.float32, jnp.float16, 2.5e-2),
    "bfloat16 in float32": (jnp.float32, jnp.bfloat16, 9e-2),
    "bfloat16 in float64": (jnp.float64, jnp.bfloat16, 9e-2),
    "bfloat16": (jnp.bfloat16, jnp.bfloat16, 9e-2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_of_differences_follows_the_precision_of_the_products(kind):
    stored, computed, bound = KINDS[kind]
    params = jax.tree.map(lambda x: x.astype(stored), network())
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    loss = lambda p: network_loss(p, computed)
    signs = cx.rademacher(jax.random.key(3), wide)
    gradient = jax.grad(network_loss)(wide, jnp.float64)
    product = quick_jit(lambda p, v: cx.hvp(loss, p, mode="finite-differences")(v))
    exact = quick_jit(lambda p, v: cx.hvp(lambda q: network_loss(q, jnp.float64), p)(v))
    for v in (signs, gradient):
        found, expected = flat(product(params, v)), flat(exact(wide, v))
        assert np.linalg.norm(found - expected) < bound * np.linalg.norm(expected)


def test_rounding_is_that_of_what_lies_between_parameters_and_results():
    w, half, preset = jnp.ones((3, 3), jnp.float32), jnp.bfloat16, jax.lax.DotAlgorithmPreset
    eps = lambda dtype: float(jnp.finfo(dtype).eps)
    data = jnp.sin(jnp.ones((3, 3), half))
    rounded = lambda w: w.astype(half).astype(jnp.float32)
    scanned = lambda w: jax.lax.scan(lambda c, _: (rounded(c), None), w, length=2)[0]
    # Rounded on the way around, two turns before the end.
    turn = lambda c, x: ((c[1], jnp.sin(c[2].astype(jnp.float32)), c[0].astype(half)), x)
    carried = lambda w: jax.lax.scan(turn, (w, w, jnp.zeros_like(w, half)), None, length=3)[0][0]
    summed = lambda w: jax.lax.scan(
        lambda c, x: (c + w * x.astype(c.dtype), jnp.cos(w).astype(half)), w, jnp.stack([data])
    )[0]
    branched = lambda w: jax.lax.cond(w[0, 0] > 0, lambda w: w, rounded, w)
    cases: list[tuple[Callable[[jax.Array], Any], float]] = [
        (lambda w: w @ w, eps(jnp.float32)),
        (lambda w: w.astype(half) @ w.astype(half), eps(half)),
        (lambda w: jax.jit(lambda w: jnp.sum(w.astype(jnp.float16)))(w), eps(jnp.float16)),
        (scanned, eps(half)),
        (branched, eps(half)),
        (lambda w: kernel(w.astype(half)).astype(jnp.float32), eps(half)),
        (lambda w: call(halving_kernel, w), eps(half)),
        (lambda w: jax.lax.reduce_precision(w, 8, 5), 2.0**-5),
        (lambda w: jnp.dot(w, w, precision=preset.TF32_TF32_F32), 2.0**-10),
        (lambda w: jnp.dot(w, w, precision=preset.BF16_BF16_F32_X3), eps(jnp.float32)),
        (carried, eps(half)),
        # What does not depend on the parameters, and what nothing depends on.
        (lambda w: w @ jnp.cos(data).astype(jnp.float32), eps(jnp.float32)),
        (summed, eps(jnp.float32)),
        (lambda w: (w.astype(half), w)[1], eps(jnp.float32)),
        (lambda w: jax.jit(lambda w: (w.astype(half), w))(w)[1], eps(jnp.float32)),
    ]
    for f, expected in cases:
        assert rounding(f, w) == expected
    assert rounding(lambda w: w.astype(jnp.float32), w.astype(half)) == eps(half)


def test_differences_are_exact_for_a_quadratic_and_skip_what_is_no_float():
    f = lambda p: {"square": p["a"] ** 2, "count": jnp.array([1, 2])}
    p, v = {"a": jnp.array([1.0, -2.0])}, {"a": jnp.array([3.0, 0.5])}
    found = differences(f, p)(v)
    np.testing.assert_allclose(found["square"], 2 * p["a"] * v["a"], rtol=1e-9)
    assert found["count"].dtype == jax.dtypes.float0


def test_the_largest_singular_value_is_about_that_of_the_leaves():
    a, b = jax.random.normal(jax.random.key(0), (6,)), jax.random.normal(jax.random.key(1), (4,))
    one = jnp.zeros((5, 7)).at[2, 3].set(-2.0)
    wide = jax.random.normal(jax.random.key(2), (40, 30))
    largest = lambda *leaves: largest_singular_value(leaves)
    np.testing.assert_allclose(
        largest(jnp.outer(a, b)), jnp.linalg.norm(a) * jnp.linalg.norm(b), rtol=1e-12
    )
    np.testing.assert_allclose(largest(one, jnp.ones(3)), 2.0)
    np.testing.assert_allclose(largest(), 0.0)
    np.testing.assert_allclose(largest(wide), jnp.linalg.norm(wide, 2), rtol=0.2)
