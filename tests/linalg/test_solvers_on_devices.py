"""Solvers under pmap, shard_map, vmap and scan, and on explicitly sharded parameters."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from linear_systems import SIZE, assert_solves, numbers, tree_of, vector_of

from curvax.devices import axes
from curvax.linalg import cg, dense, materialize, row_space, steihaug
from curvax.linear_operator import Product, Root
from curvax.planning import collectives, hlo

DEVICES = 8
pytestmark = pytest.mark.skipif(
    jax.device_count() < DEVICES,
    reason="needs XLA_FLAGS=--xla_force_host_platform_device_count=8 before jax is imported",
)
ROWS = jnp.asarray(numbers(0, 2 * DEVICES, SIZE))
B = tree_of(jnp.asarray(numbers(1, SIZE)))
DAMPING = 0.5
MATRIX = ROWS.T @ ROWS / len(ROWS) + DAMPING * np.eye(SIZE)
SOLUTION = np.linalg.solve(MATRIX, vector_of(B))
TWICE = np.linalg.solve(MATRIX, 2 * vector_of(B))

SOLVERS = {
    "cg": cg(SIZE, tol=0.0),
    "cg with all its options": cg(
        30, tol=1e-13, preconditioner=0.75, warm_start=0.9, progress=1e-16, backtrack=True
    ),
    "steihaug": steihaug(100.0, SIZE, tol=0.0),
    "dense": dense(),
    "row_space": row_space(),
}
EVERY = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
EXACT = 1e-9
"""Of conjugate gradients with as many steps as there are unknowns."""


def fisher(rows, over=()):
    """The damped mean of r rᵀ over rows, and over the devices of the axes `over`."""
    rows = axes.vary(rows, over) / np.sqrt(len(rows))
    forward = lambda v: rows @ vector_of(axes.vary(v, over))
    transpose = lambda u: tree_of(rows.T @ axes.vary(u, over))
    root = Root(forward, transpose, jax.ShapeDtypeStruct((len(rows),), rows.dtype))
    product = Product(lambda v: transpose(forward(v)), root)
    return product.averaged(over).damped(DAMPING)


def solve_twice(solver, rows, b, over=()):
    """The second solution, which a warm start has helped."""
    product, state = fisher(rows, over), solver.init(b)
    score = lambda x: vector_of(x) @ (0.5 * MATRIX @ vector_of(x) - vector_of(b))
    options = dict(diagonal=jax.tree.map(jnp.ones_like, b), score=score)
    _, state = solver.solve(product, jax.tree.map(lambda x: 2 * x, b), state, **options)
    return solver.solve(product, b, state, **options)[0]


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((DEVICES,), ("batch",), axis_types=(kind,))


def sharded(f, checked, out=None):
    specs = dict(in_specs=(P("batch"), P()), out_specs=out or P(), check_vma=checked)
    return jax.jit(jax.shard_map(f, mesh=mesh(), **specs))


@EVERY
def test_solver_on_one_device_solves_the_whole_system(solver):
    found = jax.jit(partial(solve_twice, solver))(ROWS, B)
    assert_solves(found.x, SOLUTION, EXACT)
    assert found.residual < EXACT


@EVERY
@pytest.mark.parametrize("checked", [True, False])
def test_solver_under_shard_map_solves_the_averaged_system(solver, checked):
    f = lambda rows, b: solve_twice(solver, rows, b, ("batch",))
    assert_solves(sharded(f, checked)(ROWS, B).x, SOLUTION, EXACT)


@EVERY
def test_solver_under_pmap_solves_the_averaged_system(solver):
    f = lambda rows, b: solve_twice(solver, rows, b, ("batch",))
    found = jax.pmap(f, axis_name="batch", in_axes=(0, None))(ROWS.reshape(DEVICES, 2, SIZE), B)
    assert_solves(jax.tree.map(lambda x: x[5], found.x), SOLUTION, EXACT)


@EVERY
@pytest.mark.parametrize("checked", [True, False])
def test_each_device_can_solve_its_own_system(solver, checked):
    def f(rows, b):
        number = lax.axis_index("batch")
        b = jax.tree.map(lambda x: jnp.where(number == 3, 2 * x, x), b)
        return jax.tree.map(lambda x: x[None], solve_twice(solver, rows, b))

    found = sharded(f, checked, P("batch"))(jnp.tile(ROWS, (DEVICES, 1)), B)
    assert_solves(jax.tree.map(lambda x: x[3], found.x), TWICE, EXACT)
    assert_solves(jax.tree.map(lambda x: x[4], found.x), SOLUTION, EXACT)


@pytest.mark.parametrize("solver", [cg(), steihaug(1.0)])
def test_local_vectors_with_an_averaged_product_are_refused(solver):
    def f(rows, b):
        own = axes.vary(b, ("batch",))
        return jax.tree.map(lambda x: x[None], solver(fisher(rows, ("batch",)), own).x)

    with pytest.raises(ValueError, match=r"averaged over the axis 'batch'.*pmean_updates"):
        sharded(f, True, P("batch"))(ROWS, B)


@EVERY
def test_solver_under_vmap_solves_each_vector(solver):
    many = jax.tree.map(lambda x: jnp.stack([2 * x, 0 * x, x]), B)
    found = jax.jit(jax.vmap(partial(solve_twice, solver), (None, 0)))(ROWS, many)
    for i, wanted in enumerate([TWICE, 0 * SOLUTION, SOLUTION]):
        assert_solves(jax.tree.map(lambda x, i=i: x[i], found.x), wanted, EXACT)


@EVERY
def test_solver_state_passes_through_a_scan(solver):
    options = dict(diagonal=jax.tree.map(jnp.ones_like, B), score=lambda x: jnp.zeros(()))

    def step(state, factor):
        b = jax.tree.map(lambda x: factor * x, B)
        found, state = solver.solve(fisher(ROWS), b, state, **options)
        return state, found.x

    _, found = jax.jit(lambda: lax.scan(step, solver.init(B), jnp.array([2.0, 1.0])))()
    assert_solves(jax.tree.map(lambda x: x[1], found), SOLUTION, EXACT)


def in_parts(kernel, inputs):
    """RᵀR + λI with R W = X W, for a kernel sharded along its rows."""
    whole = lambda w: jax.sharding.reshard(w, P())
    forward = lambda w: inputs @ whole(w)
    transpose = lambda u: jax.sharding.reshard(inputs.T @ u, P("batch"))
    like = jax.ShapeDtypeStruct((inputs.shape[0], kernel.shape[1]), kernel.dtype)
    root = Root(forward, transpose, like)
    return Product(lambda w: transpose(forward(w)), root, DAMPING)


@EVERY
@pytest.mark.parametrize("compiled", [True, False])
def test_solver_runs_on_explicitly_sharded_parameters(solver, compiled):
    inputs, kernel = numbers(2, 4, 16), numbers(3, 16, 2)
    explicit = mesh(AxisType.Explicit)
    with jax.set_mesh(explicit):
        b = jax.device_put(kernel, NamedSharding(explicit, P("batch")))

        def solve(b):
            options = dict(diagonal=jnp.ones_like(b), score=lambda x: -jnp.sum(x * b))
            return solver.solve(in_parts(b, inputs), b, solver.init(b), **options)[0]

        x = (jax.jit(solve) if compiled else solve)(b).x
        assert jax.typeof(x).sharding.spec == P("batch", None)
    wanted = np.linalg.solve(inputs.T @ inputs + DAMPING * np.eye(16), kernel)
    np.testing.assert_allclose(x, wanted, atol=1e-9)


@pytest.mark.parametrize("checked", [True, False])
def test_materialize_of_an_averaged_product_is_the_whole_matrix(checked):
    f = lambda rows, b: materialize(fisher(rows, ("batch",)), b)
    np.testing.assert_allclose(sharded(f, checked)(ROWS, B), MATRIX, atol=1e-14)


@pytest.mark.parametrize("checked", [True, False])
def test_cg_step_sends_one_product_alone(checked):
    f = lambda rows, b: cg(5)(fisher(rows, ("batch",)), b).x
    program = hlo.read(sharded(f, checked).lower(ROWS, B).compile())
    assert collectives.count(program) == {"all-reduce": (5, 5 * 8 * SIZE)}
