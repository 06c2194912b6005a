"""Solvers against recorded iterates, textbook loops in NumPy and dense matrices."""

import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_systems import (
    SIZE,
    assert_solves,
    definite,
    indefinite,
    jitted,
    numbers,
    product_of,
    relative_residual,
    textbook_iterates,
    tree_of,
    vector_of,
)
from trajectories import recorded

from curvax.linalg import StopReason, cg, dense, steihaug
from curvax.linear_operator import Product

B = numbers(9, SIZE)

RECORDED = pytest.mark.parametrize("path", recorded("curvature_mlp_o"))


def system(path, damping):
    arrays = np.load(path)
    matrix = jnp.asarray(arrays["ggn"] + damping * np.eye(len(arrays["ggn"])))
    return arrays, (lambda v: matrix @ v), jnp.asarray(arrays["grad"])


@RECORDED
@pytest.mark.parametrize("damping", [0.1, 0.001])
def test_cg_iterates_are_the_recorded_ones(path, damping):
    arrays, product, b = system(path, damping)
    for k in (1, 2, 5, 10):
        found = jax.jit(lambda b, k=k: cg(k, tol=0.0)(product, b))(b)
        wanted = arrays[f"ngd/lam{damping}/cg_iterates"][k - 1]
        # Rounding grows with the condition of the matrix.
        np.testing.assert_allclose(found.x, wanted, rtol=0, atol=1e-10 * np.abs(wanted).max())
        rest = arrays[f"ngd/lam{damping}/cg_residual_norm"][k - 1] / np.linalg.norm(b)
        np.testing.assert_allclose(found.residual, rest, rtol=1e-9)


@RECORDED
@pytest.mark.parametrize("damping", [0.1, 0.001])
@pytest.mark.parametrize("solver", [dense(), cg(150, tol=1e-13)], ids=["dense", "cg"])
def test_cg_and_dense_solutions_are_the_recorded_ones(path, damping, solver):
    arrays, product, b = system(path, damping)
    wanted = arrays[f"ngd/lam{damping}/solution"]
    found = jax.jit(lambda b: solver(product, b))(b)
    np.testing.assert_allclose(found.x, wanted, rtol=0, atol=1e-10 * np.abs(wanted).max())
    assert found.residual < 1e-12


@pytest.mark.parametrize("steps", [1, 4, SIZE])
def test_cg_solution_residual_and_steps_are_those_of_the_textbook(steps):
    matrix = definite()
    found = jitted(cg(steps, tol=0.0), matrix, B)
    wanted = textbook_iterates(steps, matrix, B)[-1]
    # The last step comes from a residual that is rounding to a good part.
    assert_solves(found.x, wanted.x, 1e-11 if steps < SIZE else 1e-9)
    np.testing.assert_allclose(found.residual, relative_residual(matrix, found.x, B), atol=1e-12)
    assert found.steps == steps


def test_cg_takes_as_many_steps_as_there_are_distinct_eigenvalues():
    basis, _ = np.linalg.qr(numbers(3, SIZE, SIZE))
    matrix = basis @ np.diag([1.0] * 5 + [2.0] * 4 + [5.0] * 3) @ basis.T
    found = jitted(cg(SIZE, tol=1e-12), matrix, B)
    assert found.steps == 3
    assert found.reason == StopReason.tolerance
    assert_solves(found.x, np.linalg.solve(matrix, B), 1e-12)


def test_cg_stops_at_the_first_iterate_within_the_tolerance():
    matrix = definite()
    residuals = [iterate.residual for iterate in textbook_iterates(SIZE, matrix, B)]
    found = jitted(cg(SIZE, tol=1e-2), matrix, B)
    assert found.steps == next(i for i, rest in enumerate(residuals) if rest <= 1e-2)
    assert found.reason == StopReason.tolerance


@pytest.mark.parametrize("solver", [cg(5, warm_start=0.9), steihaug(1.0), dense()])
def test_zero_right_hand_side_takes_no_iteration(solver):
    state = solver.init(tree_of(jnp.asarray(B)))
    state = jax.tree.map(jnp.ones_like, state)
    zero = tree_of(jnp.zeros(SIZE))
    found, _ = solver.solve(product_of(definite()), zero, state)
    np.testing.assert_array_equal(vector_of(found.x), np.zeros(SIZE))
    assert found.residual == 0
    if found.reason != StopReason.direct:
        assert found.steps == 0
        assert found.reason == StopReason.tolerance


@pytest.mark.parametrize("solver", [cg(), cg(2, backtrack=True), steihaug(1.0)])
def test_an_empty_tree_is_solved(solver):
    found = solver(lambda v: v, {"none": None}, score=lambda x: jnp.zeros(()))
    assert found.x == {"none": None}
    assert found.steps == 0
    assert found.residual == 0


class Counted:
    """A product that counts how often it is computed."""

    def __init__(self, matrix):
        self.matrix = matrix
        self.calls: Counter[str] = Counter()

    def __call__(self, v):
        jax.debug.callback(lambda: self.calls.update(["product"]))
        return product_of(self.matrix)(v)

    @property
    def count(self):
        jax.effects_barrier()
        return self.calls["product"]


@pytest.mark.parametrize("solver", [cg(7, tol=0.0), steihaug(1e6, 7, tol=0.0)])
def test_k_cg_steps_cost_k_products(solver):
    product = Counted(definite())
    found = jax.jit(lambda b: solver(product, b))(tree_of(jnp.asarray(B)))
    assert product.count == found.steps == 7


def test_warm_start_costs_one_of_the_products():
    solver = cg(4, tol=0.0, warm_start=0.5)
    product, b = Counted(definite()), tree_of(jnp.asarray(B))
    solve = jax.jit(lambda b, state: solver.solve(product, b, state))
    found, state = solve(b, solver.init(b))
    assert product.count == found.steps == 4
    found, _ = solve(b, state)
    assert found.steps == 4
    assert product.count == 8


def test_warm_start_is_the_decayed_last_solution():
    matrix, later = definite(), numbers(11, SIZE)
    solver = cg(5, tol=0.0, warm_start=0.8)
    b = tree_of(jnp.asarray(B))
    first, state = solver.solve(product_of(matrix), b, solver.init(b))
    second, state = solver.solve(product_of(matrix), tree_of(jnp.asarray(later)), state)
    once = textbook_iterates(5, matrix, B)[-1]
    # One of its five products is the residual of the start.
    twice = textbook_iterates(4, matrix, later, x=0.8 * once.x)[-1]
    assert_solves(first.x, once.x, 1e-11)
    assert_solves(second.x, twice.x, 1e-11)
    np.testing.assert_allclose(second.residual, twice.residual, rtol=1e-10)
    np.testing.assert_array_equal(vector_of(state), vector_of(second.x))


def test_warm_start_within_the_tolerance_is_returned():
    matrix, b = definite(), tree_of(jnp.asarray(B))
    solver = cg(20, tol=1e-8, warm_start=1.0, backtrack=True)
    solve = lambda state: solver.solve(product_of(matrix), b, state, score=lambda x: jnp.zeros(()))
    first, state = solve(solver.init(b))
    second, _ = solve(state)
    assert second.steps == 1
    assert second.reason == StopReason.tolerance
    np.testing.assert_array_equal(vector_of(second.x), vector_of(first.x))
    # Of what rounding leaves: x is known to 1e-16, and so is the residual.
    np.testing.assert_allclose(second.residual, first.residual, rtol=1e-5, atol=1e-14)


DIAGONAL = np.abs(numbers(5, SIZE)) + 0.1


@pytest.mark.parametrize("damping", [None, 0.5])
@pytest.mark.parametrize("make", [cg, lambda k, **o: steihaug(1e6, k, **o)], ids=["cg", "steihaug"])
def test_preconditioner_power_is_that_power_of_the_diagonal(make, damping):
    matrix = definite()
    product = Product(product_of(matrix), damping=damping)
    found = make(4, tol=0.0, preconditioner=0.75)(
        product, tree_of(jnp.asarray(B)), diagonal=tree_of(jnp.asarray(-DIAGONAL))
    )
    m = np.diag((DIAGONAL + (damping or 0)) ** 0.75)
    damped = matrix + (damping or 0) * np.eye(SIZE)
    assert_solves(found.x, textbook_iterates(4, damped, B, m=m)[-1].x, 1e-11)


def test_callable_preconditioner_applies_its_inverse():
    matrix, m = definite(), definite(7)
    found = jitted(cg(4, tol=0.0, preconditioner=product_of(np.linalg.inv(m))), matrix, B)
    assert_solves(found.x, textbook_iterates(4, matrix, B, m=m)[-1].x, 1e-10)


def test_preconditioning_by_the_exact_inverse_takes_one_step():
    matrix = definite()
    found = jitted(cg(preconditioner=product_of(np.linalg.inv(matrix))), matrix, B)
    assert found.steps == 1
    assert_solves(found.x, np.linalg.solve(matrix, B), 1e-12)


def test_zero_entry_of_the_diagonal_is_not_preconditioned():
    diagonal = DIAGONAL.copy()
    diagonal[3] = 0
    found = cg(3, tol=0.0, preconditioner=1.0)(
        product_of(definite()), tree_of(jnp.asarray(B)), diagonal=tree_of(jnp.asarray(diagonal))
    )
    diagonal[3] = 1
    wanted = textbook_iterates(3, definite(), B, m=np.diag(diagonal))[-1].x
    assert_solves(found.x, wanted, 1e-11)


def string(size):
    """Second differences and a force: conjugate gradients advance slowly and steadily."""
    matrix = 2 * np.eye(size) - np.eye(size, k=1) - np.eye(size, k=-1)
    return matrix, np.ones(size) + numbers(6, size)


def stops_at(models, epsilon):
    """The step at which the relative progress of Martens 2010, section 4.4, ends the loop."""
    for i in range(1, len(models)):
        k = max(10, int(np.ceil(i / 10)))
        if i > k and models[i] < 0 and (models[i] - models[i - k]) / models[i] < k * epsilon:
            return i
    return None


# The last stops at step 163, where ⌈i/10⌉ differs from ⌊i/10⌋.
@pytest.mark.parametrize("epsilon", [3e-2, 1e-2, 1e-3, 6.3e-5])
def test_progress_stop_is_the_rule_of_martens(epsilon):
    matrix, b = string(300)
    models = [iterate.model for iterate in textbook_iterates(200, matrix, b)]
    solver = cg(200, tol=0.0, progress=epsilon)
    found = jax.jit(lambda b: solver(lambda v: jnp.asarray(matrix) @ v, b))(jnp.asarray(b))
    assert found.reason == StopReason.progress
    assert found.steps == stops_at(models, epsilon)


def test_progress_is_ignored_while_the_model_is_positive():
    """From a start far up φ stays positive, and the rule of Martens would divide by it."""
    matrix, b = np.diag(np.logspace(0, 6, SIZE)), tree_of(1e-6 * jnp.ones(SIZE))
    solver = cg(SIZE, tol=0.0, warm_start=1.0, progress=10.0)
    found, _ = solver.solve(product_of(matrix), b, tree_of(jnp.ones(SIZE)))
    x = vector_of(found.x)
    assert 0.5 * x @ matrix @ x > vector_of(b) @ x
    assert found.reason == StopReason.max_steps
    assert found.steps == SIZE


def test_progress_of_zero_never_stops():
    matrix, b = string(20)
    found = cg(15, tol=0.0, progress=0.0)(lambda v: jnp.asarray(matrix) @ v, jnp.asarray(b))
    assert found.reason == StopReason.max_steps


KEPT = [1, 2, 3, 4, 5, 7, 9, 11, 12]


def go_back(iterates, score):
    """Among the kept ones, from the last back as long as the score falls."""
    kept = [iterates[step] for step in KEPT if step < len(iterates)]
    if kept[-1] is not iterates[-1]:
        kept.append(iterates[-1])
    best = kept.pop()
    while kept and score(kept[-1].x) < score(best.x):
        best = kept.pop()
    return best


@pytest.mark.parametrize("target", [1, 6, 10])
@pytest.mark.parametrize("max_steps", [8, 12])
def test_backtracking_returns_the_iterate_before_the_score_rises(target, max_steps):
    matrix = definite(floor=0.0)
    iterates = textbook_iterates(max_steps, matrix, B)
    goal = textbook_iterates(12, matrix, B)[target].x
    wanted = go_back(iterates, lambda x: np.sum((x - goal) ** 2))
    score = lambda x: jnp.sum((vector_of(x) - goal) ** 2)
    found = jitted(cg(max_steps, tol=0.0, backtrack=True), matrix, B, score=score)
    assert_solves(found.x, wanted.x, 1e-7)
    np.testing.assert_allclose(found.residual, wanted.residual, rtol=1e-6)
    assert found.steps == max_steps


def test_backtracking_returns_the_last_iterate_where_it_is_best():
    plain = jitted(cg(7, tol=0.0), definite(), B)
    score = lambda x: -jnp.sum(vector_of(x) * B)
    found = jitted(cg(7, tol=0.0, backtrack=True), definite(), B, score=score)
    np.testing.assert_array_equal(vector_of(found.x), vector_of(plain.x))


def test_backtracking_returns_an_iterate_with_a_finite_score():
    long = np.linalg.norm(textbook_iterates(2, definite(), B)[2].x)
    broken = lambda x: jnp.where(jnp.linalg.norm(vector_of(x)) > 1.0001 * long, jnp.nan, 1.0)
    found = jitted(cg(7, tol=0.0, backtrack=True), definite(), B, score=broken)
    assert_solves(found.x, textbook_iterates(2, definite(), B)[2].x, 1e-11)


def test_warm_start_is_the_last_iterate_with_backtracking():
    solver = cg(6, tol=0.0, warm_start=1.0, backtrack=True)
    b = tree_of(jnp.asarray(B))
    short = lambda x: jnp.sum(vector_of(x) ** 2)
    found, state = solver.solve(product_of(definite()), b, solver.init(b), score=short)
    iterates = textbook_iterates(6, definite(), B)
    assert_solves(found.x, iterates[1].x, 1e-11)
    assert_solves(state, iterates[6].x, 1e-11)


def test_negative_curvature_at_the_first_step_gives_the_preconditioned_gradient():
    m = definite(2)
    solver = cg(preconditioner=product_of(np.linalg.inv(m)))
    found = jitted(solver, -definite(), B)
    assert_solves(found.x, np.linalg.solve(m, B), 1e-12)
    assert found.reason == StopReason.negative_curvature
    assert found.steps == 1
    np.testing.assert_allclose(found.residual, relative_residual(-definite(), found.x, B))


def test_zero_curvature_at_the_first_step_gives_the_gradient():
    found = jitted(cg(), 0 * definite(), B)
    np.testing.assert_array_equal(vector_of(found.x), B)
    assert found.reason == StopReason.negative_curvature
    assert found.steps == found.residual == 1


def first_negative(matrix):
    """The step whose direction has negative curvature, and the iterate before it."""
    iterates = textbook_iterates(SIZE, matrix, B)
    ahead = itertools.pairwise(iterates)
    # φ rises where the curvature along p is negative: the step goes to a maximum.
    return next((i, a.x) for i, (a, b) in enumerate(ahead) if b.model > a.model)


def test_negative_curvature_at_a_later_step_gives_the_iterate_before():
    i, x = first_negative(indefinite())
    assert i > 0
    found = jitted(cg(SIZE, tol=0.0), indefinite(), B)
    assert found.reason == StopReason.negative_curvature
    assert found.steps == i + 1
    assert_solves(found.x, x, 1e-10)
    np.testing.assert_allclose(found.residual, relative_residual(indefinite(), found.x, B))


@pytest.mark.parametrize("backtrack", [False, True])
def test_product_with_nan_gives_the_last_finite_iterate(backtrack):
    iterates = textbook_iterates(4, definite(), B)
    fourth = iterates[4].x - iterates[3].x

    def product(v):
        cosine = vector_of(v) @ fourth / jnp.linalg.norm(vector_of(v)) / np.linalg.norm(fourth)
        good = product_of(definite())(v)
        return jax.tree.map(lambda x: jnp.where(cosine > 1 - 1e-9, jnp.nan, x), good)

    solver = cg(9, tol=0.0, backtrack=backtrack)
    found = solver(product, tree_of(jnp.asarray(B)), score=lambda x: -jnp.sum(vector_of(x) * B))
    assert found.reason == StopReason.breakdown
    assert found.steps == 4
    assert_solves(found.x, iterates[3].x, 1e-11)
    np.testing.assert_allclose(found.residual, iterates[3].residual, rtol=1e-10)


@pytest.mark.parametrize("solver", [cg(warm_start=1.0, backtrack=True), steihaug(1.0), dense()])
def test_right_hand_side_with_nan_gives_zero_and_breakdown(solver):
    b, state = tree_of(jnp.asarray(B)), solver.init(tree_of(jnp.asarray(B)))
    state = jax.tree.map(jnp.ones_like, state)
    b["bias"] = b["bias"].at[2].set(jnp.nan)
    score = lambda x: jnp.zeros(())
    found, _ = jax.jit(lambda b: solver.solve(product_of(definite()), b, state, score=score))(b)
    assert found.reason == StopReason.breakdown
    assert np.isnan(found.residual)
    np.testing.assert_array_equal(vector_of(found.x), np.zeros(SIZE))


def test_indefinite_preconditioner_gives_breakdown():
    found = jitted(cg(preconditioner=lambda v: jax.tree.map(jnp.negative, v)), definite(), B)
    assert found.reason == StopReason.breakdown
    assert found.steps == 0


BAD = {
    "no step": (cg, dict(max_steps=0), "`cg` takes `max_steps` as a positive integer, and got 0"),
    "half a step": (cg, dict(max_steps=2.5), "positive integer, and got 2.5"),
    "traced steps": (cg, dict(max_steps=jnp.array(3)), "must be a plain Python value"),
    "tol": (cg, dict(tol=-1.0), r"`cg` takes `tol` in \[0, inf\], and got -1.0"),
    "warm_start": (cg, dict(warm_start=1.5), r"`warm_start` in \[0, 1\], and got 1.5"),
    "no step left": (cg, dict(max_steps=1, warm_start=0.5), r"Write `cg\(2, ...\)`"),
    "progress": (cg, dict(progress=-1.0), "`cg` takes `progress`"),
    "power": (cg, dict(preconditioner=2), r"exponent ξ in \[0, 1\].*received 2"),
    "name": (steihaug, dict(radius=1.0, preconditioner="fisher"), "received 'fisher'"),
    "radius": (steihaug, dict(radius=-1.0), "`steihaug` takes `radius`"),
}


@pytest.mark.parametrize(("make", "options", "message"), BAD.values(), ids=BAD)
def test_solver_option_out_of_range_raises_at_construction(make, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(**options)


@pytest.mark.parametrize("solver", [cg(preconditioner=0.75), steihaug(1.0, preconditioner=0.75)])
def test_preconditioner_power_without_a_diagonal_raises_with_the_estimators(solver):
    with pytest.raises(ValueError, match=r"no earlier stage gave one.*`fisher_diag`.*`diagonal=`"):
        solver(product_of(definite()), tree_of(jnp.asarray(B)))


def test_backtracking_without_a_score_raises_with_what_to_pass():
    with pytest.raises(ValueError, match=r"value_fn=curvax.Objective.*`score=`"):
        cg(backtrack=True)(product_of(definite()), tree_of(jnp.asarray(B)))


def test_solutions_keep_the_dtypes_of_the_vector_and_sums_are_float32():
    b = {"bias": jnp.asarray(B[:4], jnp.bfloat16), "kernel": jnp.asarray(B[4:], jnp.float32)}
    seen = []

    def product(v):
        seen.append(jax.tree.map(lambda x: x.dtype, v))
        return jax.tree.map(lambda x: 3 * x, v)

    for solver in (cg(3, warm_start=0.5), steihaug(100.0), dense()):
        found, state = solver.solve(product, b, solver.init(b))
        assert jax.tree.map(lambda x: x.dtype, found.x) == jax.tree.map(lambda x: x.dtype, b)
        assert jax.tree.map(lambda x: x.dtype, state) in ((), jax.tree.map(lambda x: x.dtype, b))
        assert found.residual.dtype == jnp.float32
        np.testing.assert_allclose(found.x["kernel"], b["kernel"] / 3, rtol=1e-2)
    assert all(dtypes == jax.tree.map(lambda x: x.dtype, b) for dtypes in seen)


def test_thousand_bfloat16_entries_are_solved_accurately():
    scale = jnp.asarray(1 + np.arange(1000) % 7, jnp.float32)
    b = jnp.ones(1000, jnp.bfloat16)
    found = cg(40, tol=1e-3)(lambda v: scale * v, b)
    np.testing.assert_allclose(found.x.astype(jnp.float32), 1 / scale, rtol=2**-7)


def test_cg_in_float32_reaches_a_residual_near_rounding():
    matrix = definite().astype(np.float32)
    found = jitted(cg(40, tol=1e-6), matrix, B.astype(np.float32))
    assert found.reason == StopReason.tolerance
    assert relative_residual(definite(), found.x, B) < 3e-6
