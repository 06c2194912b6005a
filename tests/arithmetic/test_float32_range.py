"""Losses and matrices at any scale of float32: what is linear in it follows it to rounding."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_problems import net, net_batch, net_loss, net_params, quick_jit

import curvax as cx
from curvax.arithmetic import trees
from curvax.linalg import eigenpairs
from curvax.perturbation import ascent_rules

pytestmark = pytest.mark.usefixtures("single_precision")

SIZE = 12
SCALES = [1e-30, 1e-20, 1e-10, 1e10, 1e20, 1e30]
BASIS = np.linalg.qr(np.random.default_rng(0).normal(size=(SIZE, SIZE)))[0]
VALUES = np.linspace(0.5, 5, SIZE)
MATRIX = np.asarray((BASIS * VALUES) @ BASIS.T, np.float32)
VECTOR = np.asarray(np.random.default_rng(1).normal(size=SIZE), np.float32)
SOLUTION = np.linalg.solve(MATRIX.astype(float), VECTOR)


def tree(x: Any) -> Any:
    return {"a": x[:5], "b": x[5:].reshape(1, -1)}


def flat(x: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(x)]).astype(float)


def product(matrix: Any) -> Any:
    return lambda v: tree(matrix @ jnp.concatenate([v["a"], v["b"].ravel()]))


@quick_jit
def of_vector(x: jax.Array) -> Any:
    t = tree(x)
    turned = tree(x[::-1])
    return dict(
        norm=trees.norm(t),
        number=trees.norm(x[0]),
        unit=trees.unit(t),
        slope=jax.grad(trees.norm)(t),
        near_one=trees.norm(t) * trees.inverse(trees.magnitude(t)),
        cosine=trees.cosine(t, turned),
        rejected=trees.reject(t, turned),
        steps=[ascent_rules.dual_direction(t, p) for p in (1.5, 2, 3)],
    )


@pytest.mark.parametrize("scale", [1e-35, *SCALES, 1e35])
def test_norms_and_unit_vectors_are_exact_at_any_scale(scale):
    x = VECTOR * np.float32(scale)
    found, exact = of_vector(x), x.astype(float)
    length = np.linalg.norm(exact)
    np.testing.assert_allclose(found["norm"], length, rtol=1e-6)
    np.testing.assert_allclose(found["number"], abs(exact[0]), rtol=1e-6)
    np.testing.assert_allclose(flat(found["unit"]), exact / length, rtol=1e-5)
    np.testing.assert_allclose(flat(found["slope"]), exact / length, rtol=1e-5)
    assert 0.99 < found["near_one"] < 2.01
    turned = exact[::-1] / length
    cosine = exact @ turned / length
    np.testing.assert_allclose(found["cosine"], float(cosine), rtol=1e-4)
    rejected = (exact / length - cosine * turned) * length
    np.testing.assert_allclose(flat(found["rejected"]), rejected, atol=float(1e-6 * length))
    for p, step in zip((1.5, 2, 3), found["steps"]):
        q = p / (p - 1)
        wanted = np.sign(exact) * np.abs(exact / length) ** (q - 1)
        wanted /= np.linalg.norm(wanted, p)
        np.testing.assert_allclose(flat(step), wanted, rtol=1e-4)


def test_norm_of_zero_infinity_and_nan():
    assert trees.norm({}) == 0
    assert trees.norm(jnp.zeros(3)) == 0
    assert np.all(jax.grad(trees.norm)(jnp.zeros(3)) == 0)
    assert np.all(jax.jacobian(trees.unit)(jnp.zeros(3)) == 0)
    assert np.isinf(trees.norm(jnp.array([1.0, -jnp.inf])))
    assert np.isnan(trees.norm(jnp.array([1.0, jnp.nan])))
    assert trees.magnitude(jnp.array([jnp.nan])) == 1


@pytest.mark.parametrize("size", [1, 5])
def test_cosine_of_a_long_and_a_tiny_vector_is_exact(size, single_precision):
    a, b = jnp.linspace(1e3, 2e3, size), jnp.linspace(3e-27, -1e-27, size)
    found = jax.jit(trees.cosine)(a, b)
    x, y = np.asarray(a, float), np.asarray(b, float)
    expected = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e30])
def test_norm_and_scale_has_the_derivative_of_norm(size):
    x = size * jnp.array([3.0, 4.0], jnp.float32)
    length, scale = trees.norm_and_scale(x)
    assert length == trees.norm(x)
    assert scale == trees.inverse(trees.power_of_two(length))
    found = jax.grad(lambda x: sum(trees.norm_and_scale(x)))(x)
    np.testing.assert_array_equal(found, jax.grad(trees.norm)(x))


def test_unit_vector_of_zero_has_length_zero():
    length = jax.jit(lambda x: trees.norm(trees.unit(x)))
    assert length(jnp.zeros(3)) == 0
    assert abs(length(jnp.ones(3)) - 1) < 1e-6


def test_derivatives_of_the_unit_vector_are_those_of_autodiff():
    x, w = jnp.array([0.3, -0.2, 0.5]), jnp.array([1.0, 2.0, 3.0])
    plain = lambda x: w @ (x / jnp.sqrt(jnp.sum(x * x)))
    ours = lambda x: w @ trees.unit(x)
    np.testing.assert_allclose(jax.grad(ours)(x), jax.grad(plain)(x), rtol=1e-5)
    np.testing.assert_allclose(jax.hessian(ours)(x), jax.hessian(plain)(x), rtol=1e-4, atol=1e-5)


def test_norm_of_half_precision_trees_is_float32():
    x = VECTOR.astype(jnp.bfloat16) * jnp.bfloat16(1e-25)
    np.testing.assert_allclose(
        trees.norm(x), np.linalg.norm(np.asarray(x).astype(np.float64)), rtol=1e-6
    )
    half = jnp.asarray(VECTOR * 1e-6, jnp.float16)
    np.testing.assert_allclose(
        trees.norm(half), np.linalg.norm(np.asarray(half).astype(np.float64)), rtol=1e-6
    )


@quick_jit
def of_matrix(matrix: jax.Array, b: jax.Array, radius: jax.Array) -> Any:
    apply, v0, rhs = product(matrix), tree(jnp.asarray(VECTOR)), tree(b)
    probes = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x, 2 * x]), v0)
    trace = cx.estimate_trace(apply, probes)
    return dict(
        power=cx.power_iteration(apply, v0, max_steps=300),
        pairs=eigenpairs(apply, v0, 3),
        tridiagonal=[cx.lanczos(apply, v0, 6, keep_basis=keep).matrix for keep in (True, False)],
        nodes=cx.spectral_density(apply, probes, 4).nodes,
        trace=jnp.stack(trace),
        solutions=dict(
            cg=cx.cg(30)(apply, rhs),
            preconditioned=cx.cg(30, preconditioner=0.75)(
                apply, rhs, diagonal=tree(jnp.diag(matrix))
            ),
            dense=cx.dense()(apply, rhs),
            steihaug=cx.steihaug(radius)(apply, rhs),
        ),
    )


REASONS = {
    "cg": cx.StopReason.tolerance,
    "preconditioned": cx.StopReason.tolerance,
    "dense": cx.StopReason.direct,
    "steihaug": cx.StopReason.boundary,
}


@pytest.mark.parametrize("of", ["matrix", "vector", "both"])
@pytest.mark.parametrize("scale", SCALES)
def test_solvers_and_eigenpairs_follow_the_scale_of_matrix_and_vector(scale, of):
    a = np.float32(scale if of != "vector" else 1)
    k = np.float32(scale if of != "matrix" else 1)
    ratio = float(k) / float(a)
    wanted: Any
    base = of_matrix(MATRIX, VECTOR, np.float32(0.1))
    found = of_matrix(MATRIX * a, VECTOR * k, np.float32(0.1 * ratio))

    np.testing.assert_allclose(found["power"].value, 5 * float(a), rtol=1e-5)
    np.testing.assert_allclose(found["pairs"].values, VALUES[:-4:-1] * float(a), rtol=1e-5)
    assert found["power"].converged
    assert all(found["pairs"].converged)
    for name in ("tridiagonal", "nodes", "trace"):
        wanted = [float(a) * np.asarray(x, float) for x in jax.tree.leaves(base[name])]
        for x, y in zip(jax.tree.leaves(found[name]), wanted):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * np.abs(y).max())
    for name, solution in found["solutions"].items():
        assert solution.reason == REASONS[name], name
        x = flat(solution.x)
        if name == "steihaug":
            np.testing.assert_allclose(np.linalg.norm(x), 0.1 * ratio, rtol=1e-5)
            exact = flat(base["solutions"][name].x) * ratio
        else:
            exact = SOLUTION * ratio
        np.testing.assert_allclose(x, exact, atol=1e-4 * np.abs(exact).max(), err_msg=name)


@pytest.mark.parametrize("scale", [1e-25, 1e-15, 1e15])
def test_negative_curvature_is_detected_at_any_scale(scale):
    matrix = np.float32(scale) * np.diag(np.array([1, 2, -3], np.float32))
    b = np.float32(scale) * np.ones(3, np.float32)
    found = cx.cg(5)(lambda v: jnp.asarray(matrix) @ v, jnp.asarray(b))
    assert found.reason == cx.StopReason.negative_curvature
    np.testing.assert_allclose(found.x, b, rtol=1e-6)


def test_solvers_return_zero_for_a_zero_right_hand_side():
    for solver in (cx.cg(5), cx.steihaug(0.1), cx.dense()):
        found = solver(product(MATRIX), tree(jnp.zeros(SIZE)))
        assert np.all(flat(found.x) == 0)
        assert found.residual == 0


def test_steihaug_takes_infinite_and_zero_radii():
    apply, b = product(MATRIX), tree(jnp.asarray(VECTOR))
    free = cx.steihaug(jnp.inf, 30)(apply, b)
    assert free.reason == cx.StopReason.tolerance
    np.testing.assert_allclose(flat(free.x), SOLUTION, rtol=1e-3, atol=1e-4)
    none = cx.steihaug(0.0, 30)(apply, b)
    assert none.reason == cx.StopReason.boundary
    assert np.all(flat(none.x) == 0)


SGD = optax.scale_by_learning_rate(1.0)
PIPES = {  # with the power of the loss's scale that updates follow
    "sam": (1, lambda s: cx.sam_perturb(0.05)),
    "sam of second order": (1, lambda s: cx.sam_perturb(0.05, second_order=True)),
    "asam": (1, lambda s: cx.sam_perturb(0.5, ascent=cx.asam(0.01))),
    "gsam": (1, lambda s: cx.sam_perturb(0.05) | cx.gsam_project(0.4)),
    "look_sam": (1, lambda s: cx.sam_perturb(0.05, every=2) | cx.keep_orthogonal(0.7)),
    "newton": (
        0,
        lambda s: cx.hessian_matvec() | cx.damp(2 * s) | cx.solve(cx.cg(30)) | cx.quadratic_step(),
    ),
    "trust region": (
        1,
        lambda s: cx.gauss_newton_matvec() | cx.trust_region(1e-3 * s * s**0.5),
    ),
}


@pytest.mark.parametrize("name", PIPES)
def test_steps_follow_the_scale_of_the_loss(name):
    power, make = PIPES[name]
    batch, params = net_batch(dtype=jnp.float32), net_params(jnp.float32)

    @quick_jit
    def steps(scale: jax.Array) -> Any:
        model_loss = lambda z, b: scale * jnp.mean(jnp.sum((z - b["y"]) ** 2, axis=1))
        f = cx.Objective(model_loss, batch, model=net)
        tx = make(scale)
        value, gradient = f.value_and_grad(params)
        first, state = tx.update(gradient, tx.init(params), params, value_fn=f, value=value)
        second, state = tx.update(gradient, state, params, value_fn=f, value=value)
        return (first, second), cx.diagnostics(state)

    base, figures = steps(jnp.float32(1))
    # The radius of 1e-25 would be out of range.
    for scale in (1e-20 if name == "trust region" else 1e-25, 1e15):
        found, scaled = steps(jnp.float32(scale))
        wanted = scale**power * flat(base)
        np.testing.assert_allclose(flat(found), wanted, atol=1e-3 * np.abs(wanted).max())
        if "cosine" in figures:
            np.testing.assert_allclose(scaled["cosine"], figures["cosine"], rtol=1e-4)
        if "cg_reason" in figures:
            assert scaled["cg_reason"] == figures["cg_reason"]


def test_row_space_is_exact_at_a_small_gradient():
    batch, params = net_batch(dtype=jnp.float32), net_params(jnp.float32)
    fisher = cx.fvp(cx.Objective(cx.gaussian("y"), batch, model=net), params)
    gradient = jax.grad(net_loss)(params, batch)
    for product in (fisher, fisher.damped(0.1)):
        base = flat(cx.row_space()(product, gradient).x)
        small = cx.row_space()(product, trees.scale(2.0**-100, gradient))
        np.testing.assert_allclose(flat(small.x), 2.0**-100 * base, rtol=1e-5)
        assert small.reason == cx.StopReason.direct
