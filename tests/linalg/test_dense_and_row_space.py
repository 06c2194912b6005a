"""Dense and row-space solves, and the matrix of a product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from linear_systems import (
    SIZE,
    assert_solves,
    definite,
    indefinite,
    jitted,
    numbers,
    product_of,
    relative_residual,
    tree_of,
    vector_of,
)

from curvax.linalg import StopReason, cg, dense, materialize, row_space
from curvax.linear_operator import Product, Root

B = numbers(9, SIZE)


@pytest.mark.parametrize("chunk", [None, 1, 5, 12, 100])
def test_materialize_gives_a_matrix_that_is_not_symmetric(chunk):
    matrix = numbers(0, SIZE, SIZE)
    found = materialize(product_of(matrix), tree_of(jnp.asarray(B)), chunk=chunk)
    np.testing.assert_allclose(found, matrix, rtol=1e-14)


def test_materialize_orders_rows_as_ravel_pytree():
    params = {"b": jnp.ones((2, 3)), "a": [jnp.ones(()), None, jnp.ones(4)]}
    f = lambda p: jnp.sum(jnp.sin(p["b"])) * jnp.prod(p["a"][2]) + p["a"][0] ** 2
    flat, unravel = ravel_pytree(params)
    product = lambda v: jax.jvp(jax.grad(f), (params,), (v,))[1]
    wanted = jax.jit(jax.hessian(lambda x: f(unravel(x))))(flat)
    found = jax.jit(lambda like: materialize(product, like))(params)
    np.testing.assert_allclose(found, wanted, atol=1e-14)


def test_materialize_takes_shapes():
    like = {"x": jax.ShapeDtypeStruct((2, 2), np.float32), "y": jax.ShapeDtypeStruct((1,), "f4")}
    found = materialize(lambda v: jax.tree.map(lambda x: 2 * x, v), like)
    np.testing.assert_array_equal(found, 2 * np.eye(5))
    assert found.dtype == jnp.float32


def test_materialize_promotes_mixed_dtypes():
    like = {"x": jnp.ones(2, jnp.bfloat16), "y": jnp.ones(1, jnp.float32)}
    found = materialize(lambda v: {"x": 3 * v["x"], "y": v["y"] + v["x"][:1]}, like)
    np.testing.assert_array_equal(found, [[3, 0, 0], [0, 3, 0], [1, 0, 1]])
    assert found.dtype == jnp.float32


def test_materialize_of_an_empty_tree_is_empty():
    assert materialize(lambda v: v, {}).shape == (0, 0)
    found = dense()(lambda v: v, {"none": None})
    assert found.x == {"none": None}
    assert found.residual == 0


@pytest.mark.parametrize("matrix", [definite(), indefinite(), -definite()])
def test_dense_solves_definite_and_indefinite_systems(matrix):
    found = jitted(dense(), matrix, B)
    assert_solves(found.x, np.linalg.solve(matrix, B), 1e-12)
    np.testing.assert_allclose(found.residual, relative_residual(matrix, found.x, B), atol=1e-14)
    assert found.reason == StopReason.direct
    assert found.steps == SIZE


def test_dense_reports_breakdown_and_returns_zero_for_a_singular_matrix():
    found = jitted(dense(), np.zeros((SIZE, SIZE)), B)
    np.testing.assert_array_equal(vector_of(found.x), np.zeros(SIZE))
    assert found.reason == StopReason.breakdown
    assert found.residual == 1


def rooted(rows, damping=None, seed=2):
    """RᵀR + λI for an R of `rows` rows in two outputs, and the matrix R."""
    matrix = jnp.asarray(numbers(seed, rows, SIZE))
    shapes = {"a": (1,), "b": ((rows - 1) // 2, 2)}

    def forward(v):
        u = matrix @ vector_of(v)
        return {"a": u[:1], "b": u[1:].reshape(shapes["b"])}

    transpose = lambda u: tree_of(matrix.T @ jnp.concatenate([u["a"], u["b"].ravel()]))
    like = {name: jax.ShapeDtypeStruct(shape, matrix.dtype) for name, shape in shapes.items()}
    root = Root(forward, transpose, like)
    product = Product(lambda v: transpose(forward(v)), root, damping)
    return product, np.asarray(matrix)


@pytest.mark.parametrize("rows", [5, 21])
@pytest.mark.parametrize("damping", [1e-3, 0.5, jnp.asarray(0.5)])
def test_row_space_is_the_dense_solution(rows, damping):
    product, r = rooted(rows, damping)
    found = jax.jit(lambda b: row_space()(product, b))(tree_of(jnp.asarray(B)))
    wanted = np.linalg.solve(r.T @ r + float(damping) * np.eye(SIZE), B)
    # The part of b outside the rows is divided by λ.
    assert_solves(found.x, wanted, 1e-13 / float(damping))
    assert found.reason == StopReason.direct
    assert found.steps == rows
    assert found.residual < 1e-10


@pytest.mark.parametrize("damping", [None, 0, 0.0])
@pytest.mark.parametrize("rows", [5, 21])
def test_row_space_without_damping_is_the_pseudo_inverse(rows, damping):
    product, r = rooted(rows, damping)
    found = jax.jit(lambda b: row_space()(product, b))(tree_of(jnp.asarray(B)))
    assert_solves(found.x, np.linalg.pinv(r.T @ r, rcond=1e-10) @ B, 1e-9)
    rest = relative_residual(r.T @ r, found.x, B)
    np.testing.assert_allclose(found.residual, rest, atol=1e-9)


def test_row_space_of_repeated_rows_is_the_pseudo_inverse():
    half = numbers(2, 3, SIZE)
    r = jnp.asarray(np.concatenate([half, half]))
    root = Root(lambda v: r @ vector_of(v), lambda u: tree_of(r.T @ u), jnp.zeros(6))
    product = Product(lambda v: tree_of(r.T @ (r @ vector_of(v))), root)
    found = row_space()(product, tree_of(jnp.asarray(B)))
    assert_solves(found.x, np.linalg.pinv(r.T @ r, rcond=1e-10) @ B, 1e-10)


def test_row_space_reports_breakdown_at_a_traced_damping_of_zero():
    product, _ = rooted(5, jnp.zeros(()))
    found = row_space()(product, tree_of(jnp.asarray(B)))
    assert found.reason == StopReason.breakdown
    np.testing.assert_array_equal(vector_of(found.x), np.zeros(SIZE))


def test_row_space_keeps_bfloat16():
    b = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree_of(jnp.asarray(B)))
    product, _ = rooted(5, 0.5)
    found = row_space()(product, b)
    assert {x.dtype for x in jax.tree.leaves(found.x)} == {jnp.dtype(jnp.bfloat16)}
    assert_solves(jax.tree.map(jnp.float32, found.x), vector_of(row_space()(product, b).x), 1e-2)


@pytest.mark.parametrize("product", [product_of(definite()), Product(product_of(definite()))])
def test_row_space_without_a_root_raises_with_the_products_that_have_one(product):
    with pytest.raises(ValueError, match=r"has none.*`fisher_matvec\(\)`.*`cg\(20\)`"):
        row_space()(product, tree_of(jnp.asarray(B)))


@pytest.mark.parametrize("solver", [dense(), row_space()])
def test_direct_solvers_multiply_at_the_highest_precision(solver):
    r = np.float32(numbers(1, 5, SIZE))
    exact = jax.lax.Precision.HIGHEST
    root = Root(
        lambda v: jnp.matmul(r, vector_of(v), precision=exact),
        lambda u: tree_of(jnp.matmul(r.T, u, precision=exact)),
        jnp.zeros(5, jnp.float32),
    )
    product = Product(lambda v: root.transpose(root.forward(v)), root)
    b = tree_of(jnp.asarray(np.float32(B)))
    program = str(jax.make_jaxpr(lambda b: solver(product, b))(b))
    assert program.count("dot_general[") == program.count("precision=(Precision.HIGHEST") >= 3


def test_all_solvers_agree_on_a_damped_product():
    product, r = rooted(7, 0.5)
    b = tree_of(jnp.asarray(B))
    wanted = np.linalg.solve(r.T @ r + 0.5 * np.eye(SIZE), B)
    for solver in (cg(30, tol=1e-12), dense(), row_space()):
        assert_solves(solver(product, b).x, wanted, 1e-10)
