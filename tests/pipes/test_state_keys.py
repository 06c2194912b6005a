"""Keys in a state: plain data for whoever keeps it, and the same draws as from the typed key."""

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from jax.sharding import NamedSharding, PartitionSpec
from small_problems import assert_trees_close

import curvax as cx
from curvax.pipes.state_keys import StateKeys

BATCH = {"x": jax.random.normal(jax.random.key(1), (8, 4)), "y": jnp.arange(8) % 3}
PARAMS = {"k": jax.random.normal(jax.random.key(2), (4, 3)), "b": jnp.zeros(3)}
IMPLS = ["threefry2x32", "rbg", "unsafe_rbg"]


def predict(params: Any, batch: Any) -> jax.Array:
    return jnp.tanh(batch["x"] @ params["k"]) + params["b"][None]


OBJECTIVE = cx.Objective(cx.categorical("y"), BATCH, model=predict)


def drawing(key: Any) -> cx.Stage:
    """A direction, a diagonal and a product that draw, and a group's own draws."""
    at_random = cx.sam_perturb(0.1, ascent=cx.random_direction(key))
    return (
        cx.per_group(4, at_random)
        | cx.every(2, cx.hutchinson_diag(key))
        | cx.fisher_matvec(samples=1, key=key)
        | cx.damp(0.5)
        | cx.solve(cx.cg(2))
        | optax.scale(-0.1)
    )


@partial(jax.jit, static_argnums=0)
def step(tx: cx.Stage, params: Any, state: Any) -> tuple[Any, Any]:
    _, grads = OBJECTIVE.value_and_grad(params)
    updates, state = tx.update(grads, state, params, value_fn=OBJECTIVE)
    return optax.apply_updates(params, updates), state


TX = drawing(3)


@pytest.fixture(scope="module")
def after_two() -> tuple[Any, Any]:
    params, state = PARAMS, TX.init(PARAMS)
    for _ in range(2):
        params, state = step(TX, params, state)
    return params, state


@pytest.fixture(scope="module")
def after_four(after_two: tuple[Any, Any]) -> tuple[Any, Any]:
    return step(TX, *step(TX, *after_two))


def typed(state: Any, impl: str = "threefry2x32") -> Any:
    """The state as earlier versions kept it."""
    wrap = partial(jax.random.wrap_key_data, impl=impl)
    return jax.tree.map(lambda x: wrap(x) if x.dtype == jnp.uint32 else x, state)


def by_msgpack(state: Any, folder: Path) -> Any:
    return serialization.from_bytes(TX.init(PARAMS), serialization.to_bytes(state))


def by_state_dict(state: Any, folder: Path) -> Any:
    plain = serialization.msgpack_restore(
        serialization.msgpack_serialize(serialization.to_state_dict(state))
    )
    return serialization.from_state_dict(TX.init(PARAMS), plain)


def by_pickle(state: Any, folder: Path) -> Any:
    return pickle.loads(pickle.dumps(state))


def by_numpy(state: Any, folder: Path) -> Any:
    leaves, treedef = jax.tree.flatten(state)
    np.savez(folder / "state.npz", *map(np.asarray, leaves))
    return jax.tree.unflatten(treedef, np.load(folder / "state.npz").values())


def by_orbax(state: Any, folder: Path) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, TX.init(PARAMS))
        return checkpointer.restore(folder / "state", shapes)


def by_orbax_of_typed_keys(state: Any, folder: Path) -> Any:
    return by_orbax(typed(state), folder)


def by_device_put(state: Any, folder: Path) -> Any:
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), (jax.sharding.AxisType.Auto,))
    return jax.device_put(state, NamedSharding(mesh, PartitionSpec()))


KEEPERS = [
    by_msgpack, by_state_dict, by_pickle, by_numpy, by_orbax, by_orbax_of_typed_keys, by_device_put
]  # fmt: skip


@pytest.mark.parametrize("keep", KEEPERS)
def test_restored_state_continues_bit_for_bit(keep, after_two, after_four, tmp_path):
    params, state = after_two
    kept = keep(state, tmp_path)
    found, last = step(TX, *step(TX, params, kept))
    jax.tree.map(np.testing.assert_array_equal, found, after_four[0])
    assert_trees_close(data_of(last), after_four[1], 0)


def data_of(state: Any) -> Any:
    data = lambda x: jax.random.key_data(x) if is_typed(x) else x
    return jax.tree.map(data, state)


def is_typed(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def test_tree_functions_accept_a_state_with_keys(after_two):
    _, state = after_two
    half = lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x
    chex.assert_trees_all_close(state, jax.tree.map(jnp.copy, state))
    optax.tree.cast(state, jnp.float32)
    optax.tree.norm(state)
    keys = lambda tree: [x for x in jax.tree.leaves(tree) if x.dtype == jnp.uint32]
    assert [x.tolist() for x in keys(jax.tree.map(half, state))] == [
        x.tolist() for x in keys(state)
    ]
    assert len(keys(state)) == 3


@pytest.mark.parametrize("impl", IMPLS)
def test_draws_are_those_of_the_typed_key(impl):
    """By hand, from the key: H z ⊙ z, where z is drawn from the key folded with the step."""
    key = jax.random.key(5, impl=impl)
    tx = cx.hutchinson_diag(key)
    state = tx.init(PARAMS)
    assert state.key.dtype == jnp.uint32
    np.testing.assert_array_equal(state.key, jax.random.key_data(key))
    for number in range(2):
        signal = cx.Signal(PARAMS, PARAMS)
        out, state = tx.update(signal, state, PARAMS, value_fn=OBJECTIVE)
        z = cx.rademacher(jax.random.fold_in(key, number), PARAMS)
        product = cx.hvp(OBJECTIVE, PARAMS)(z)
        assert_trees_close(out.diagonal, jax.tree.map(jnp.multiply, z, product))


# Under `vmap`, which the groups at once are, JAX's other implementations draw other numbers.
@pytest.mark.parametrize(
    ("impl", "sequential"), [("threefry2x32", False), *((impl, True) for impl in IMPLS)]
)
def test_groups_draw_by_their_number_from_a_key_of_any_implementation(impl, sequential):
    """By hand: the key advanced once a step, folded with group, step and piece of the batch."""
    key, fold = jax.random.key(5, impl=impl), jax.random.fold_in
    tx = cx.per_group(
        4, cx.sam_perturb(0.3, ascent=cx.random_direction(key)), sequential=sequential
    )
    state = tx.init(PARAMS)
    run = jax.jit(lambda state: tx.update(PARAMS, state, PARAMS, value_fn=OBJECTIVE))
    for number in range(2):
        updates, state = run(state)
        expected = []
        for group in range(2):
            drawn = fold(fold(fold(key, group), number), group)
            flat = [
                jax.random.normal(fold(drawn, i), x.shape, x.dtype)
                for i, x in enumerate(jax.tree.leaves(PARAMS))
            ]
            length = jnp.sqrt(sum(jnp.sum(x**2) for x in flat))
            z = jax.tree.unflatten(jax.tree.structure(PARAMS), flat)
            there = jax.tree.map(lambda p, z, n=length: p + 0.3 * z / n, PARAMS, z)
            part = jax.tree.map(lambda x, g=group: x[4 * g : 4 * g + 4], BATCH)
            expected.append(OBJECTIVE.on(part).value_and_grad(there)[1])
        assert_trees_close(updates, jax.tree.map(lambda a, b: (a + b) / 2, *expected))
        key = fold(key, 2)
        np.testing.assert_array_equal(state[0].keys[0], jax.random.key_data(key))


def counting(dtype: Any = jnp.uint32) -> optax.GradientTransformation:
    """A plain part whose state is data that looks like that of a key."""
    init = lambda params: jnp.array([3, 4], dtype)
    return optax.GradientTransformation(init, lambda u, state, params=None: (u, state + 1))


def test_uint32_data_of_other_parts_is_not_treated_as_a_key():
    tx = cx.per_group(4, cx.sam_perturb(0.1, ascent=cx.random_direction(3)) | counting())
    state = tx.init(PARAMS)
    _, new = tx.update(PARAMS, state, PARAMS, value_fn=OBJECTIVE)
    np.testing.assert_array_equal(new[1], [4, 5])
    assert (np.asarray(new[0].keys[0]) != np.asarray(state[0].keys[0])).any()


def test_typed_keys_of_other_parts_are_folded():
    tx = cx.per_group(4, cx.pipe(optax.add_noise(1.0, 0.5, 3)))
    state = tx.init(PARAMS)
    updates, new = tx.update(PARAMS, state, PARAMS, value_fn=OBJECTIVE)
    key = state[0].rng_key
    expected = []
    for group in range(2):
        part = jax.tree.map(lambda x, g=group: x[4 * g : 4 * g + 4], BATCH)
        _, grads = OBJECTIVE.on(part).value_and_grad(PARAMS)
        started = state[0]._replace(rng_key=jax.random.fold_in(key, group))
        expected.append(optax.add_noise(1.0, 0.5, 3).update(grads, started)[0])
    assert_trees_close(updates, jax.tree.map(lambda a, b: (a + b) / 2, *expected))
    assert new[0].rng_key == jax.random.fold_in(key, 2)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.chain(optax.identity(), tx),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: cx.restrict(tx, {"k": True, "b": False}),
        lambda tx: cx.every(2, tx),
        lambda tx: optax.inject_hyperparams(lambda x: cx.pipe(tx, optax.scale(x)))(1.0),
        lambda tx: optax.GradientTransformationExtraArgs(jax.jit(tx.init), tx.update),
        lambda tx: cx.per_group(2, tx),
        lambda tx: cx.levenberg_marquardt(tx),
    ],
)
def test_key_is_recognised_inside_any_wrapper(wrap):
    tx = wrap(cx.hutchinson_diag(jax.random.key(3, impl="unsafe_rbg")))
    state = tx.init(PARAMS)
    keys = StateKeys(tx.init, PARAMS)
    found = keys.map(lambda key: jax.random.fold_in(key, 7), state)
    expected = jax.random.fold_in(jax.random.key(3, impl="unsafe_rbg"), 7)
    changed = [(x, y) for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(state)) if x is not y]
    assert len(changed) == 1
    np.testing.assert_array_equal(changed[0][0], jax.random.key_data(expected))
    jax.tree.map(lambda x: chex.assert_type(x, x.dtype), tx.init(PARAMS))
    assert not any(map(is_typed, jax.tree.leaves(tx.init(PARAMS))))


def test_groups_warn_of_half_precision_at_init_alone(recwarn):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    tx = cx.per_group(4, cx.sam_perturb(0.1))
    state = tx.init(params)
    given = len(recwarn)
    tx.update(params, state, params, value_fn=OBJECTIVE)
    assert len(recwarn) == given == 1


def test_seed_keeps_the_key_implementation_of_its_construction():
    with jax.default_prng_impl("rbg"):
        tx = cx.hutchinson_diag(5)
    state = tx.init(PARAMS)
    np.testing.assert_array_equal(state.key, jax.random.key_data(jax.random.key(5, impl="rbg")))
    out, _ = tx.update(cx.Signal(PARAMS, PARAMS), state, PARAMS, value_fn=OBJECTIVE)
    z = cx.rademacher(jax.random.fold_in(jax.random.key(5, impl="rbg"), 0), PARAMS)
    expected = jax.tree.map(jnp.multiply, z, cx.hvp(OBJECTIVE, PARAMS)(z))
    assert_trees_close(out.diagonal, expected)


def test_reset_of_levenberg_marquardt_restores_the_initial_key():
    """Uphill steps are undone whatever λ, and from the second on the state starts anew."""
    inner = cx.fisher_matvec(samples=1, key=3) | cx.damp() | cx.solve(cx.cg(2)) | optax.sgd(-1e12)
    tx = cx.levenberg_marquardt(inner, 1.0)
    state = start = tx.init(PARAMS)
    for _ in range(3):
        _, state = tx.update(PARAMS, state, PARAMS, value_fn=OBJECTIVE)
    assert int(state.rejected) == 3
    assert_trees_close(state.inner[0], start.inner[0], 0)
