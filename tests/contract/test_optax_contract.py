"""The contract of an Optax transformation, kept by every stage and every method."""

import inspect
import warnings
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract_table import TABLE, Row, divide, is_hidden, make_batch, make_params, predict
from small_problems import assert_trees_close, quick_jit

import curvax as cx
from curvax.pipes.signal import kinds


def objective_on(batch: Any, model: Callable[..., jax.Array] = predict) -> cx.Objective:
    return cx.Objective(cx.gaussian("y"), batch, model=model)


@pytest.fixture(scope="module", params=TABLE)
def row(request: pytest.FixtureRequest) -> Row:
    return TABLE[request.param]


@pytest.fixture(scope="module")
def tx(row: Row) -> cx.Stage:
    return row.build(**row.numbers)


def first_step(tx: Any, params: Any, model: Any = predict, batch: Any = None) -> tuple[Any, Any]:
    """(updates, state) after one step."""
    objective = objective_on(make_batch() if batch is None else batch, model)
    _, grads = objective.value_and_grad(params)
    return tx.update(grads, tx.init(params), params, value_fn=objective)


def mini_steps(tx: cx.Stage, params: Any) -> tuple[Any, Any, Any]:
    """With `MultiSteps` after the stage: its updates as it waits and steps, and each batch's."""
    several = tx | optax.MultiSteps(optax.identity(), 2, accumulator_dtype=jnp.float64)
    batches = [make_batch(), jax.tree.map(lambda x: 0.5 * x[::-1] - 1, make_batch())]
    state, alone, both, each = several.init(params), tx.init(params), [], []
    for batch in batches:
        objective = objective_on(batch)
        grads = jax.grad(objective)(params)
        updates, state = several.update(grads, state, params, value_fn=objective)
        own, alone = tx.update(grads, alone, params, value_fn=objective)
        both.append(updates)
        each.append(own)
    return *both, each


def step_on_hidden(tx: cx.Stage, params: Any) -> Any:
    """The updates of a model whose only parameters are those of the hidden layer."""
    part = {"hidden": params["hidden"], "out": {"bias": None}}
    model = lambda part, batch: predict({**params, "hidden": part["hidden"]}, batch)
    return first_step(tx, part, model)[0]["hidden"]


def vmapped_step(tx: cx.Stage, params: Any) -> Any:
    several = jax.tree.map(lambda x: jnp.stack([x, -2 * x]), params)
    return jax.vmap(lambda params: first_step(tx, params)[0])(several)


def half_precision_step(tx: cx.Stage, params: Any) -> Any:
    halved = optax.tree.cast(params, jnp.bfloat16)
    return first_step(tx, halved, batch=make_batch(dtype=jnp.bfloat16))[0]


@pytest.fixture(scope="module")
def results(row: Row, tx: cx.Stage) -> dict[str, Any]:
    """What the stage gives alone and inside every wrapper, compiled together."""
    injected = optax.inject_hyperparams(row.build)(**row.numbers)

    def run(params: Any) -> dict[str, Any]:
        return {
            "alone": first_step(tx, params),
            "chain": first_step(optax.chain(optax.identity(), tx), params)[0],
            "inject_hyperparams": first_step(injected, params),
            "MultiSteps": mini_steps(tx, params),
            "apply_if_finite": first_step(optax.apply_if_finite(tx, 5), params),
            "restrict": first_step(cx.restrict(tx, is_hidden), params)[0],
            "hidden alone": step_on_hidden(tx, params),
            "vmap": vmapped_step(tx, params),
            "bfloat16": half_precision_step(tx, params),
        }

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return quick_jit(run)(make_params())


def test_contract_table_has_every_stage_and_method():
    public = {name: getattr(cx, name) for name in cx.__all__}
    makers = {
        name
        for name, thing in public.items()
        if inspect.isfunction(thing)
        and inspect.signature(thing).return_annotation in (cx.Stage, "Stage")
    }
    makers.remove("split_real_and_imaginary")  # see tests/stages/test_complex_parameters.py
    assert makers == {part.split()[0] for name in TABLE for part in name.split(" | ")}


def test_stage_compiles_once_and_is_finite_at_zero_gradient(tx, results):
    traces: list[None] = []

    @quick_jit
    def step(params, state, batch):
        traces.append(None)
        objective = objective_on(batch)
        _, grads = objective.value_and_grad(params)
        return grads, tx.update(grads, state, params, value_fn=objective)

    params, batch = make_params(), make_batch()
    _, (updates, state) = step(params, tx.init(params), batch)
    assert_trees_close((updates, state), results["alone"])
    nowhere = jax.tree.map(jnp.zeros_like, params)
    grads, (updates, state) = step(nowhere, state, {**batch, "y": jnp.zeros_like(batch["y"])})
    assert_trees_close(grads, nowhere)
    assert all(bool(jnp.isfinite(u).all()) for u in jax.tree.leaves(updates))
    # A structure, dtype or weak type that had changed in the state would have traced anew.
    assert len(traces) == 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_stage_keeps_dtypes_and_structure(tx, dtype):
    params, batch = make_params(dtype), make_batch(dtype=dtype)
    kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    updates, state = jax.eval_shape(lambda p: first_step(tx, p, batch=batch), params)
    assert kinds(updates) == kinds(params)
    assert kinds(state) == kinds(jax.eval_shape(tx.init, params))


def test_state_keeps_keys_as_plain_data(tx):
    leaves = jax.tree.leaves(tx.init(make_params()))
    assert not any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves)
    jax.tree.map(np.asarray, leaves)


def test_stage_without_draws_keeps_no_key():
    drawing = [cx.fisher_matvec(samples=1), cx.gauss_newton_diag(), cx.fisher_diag()]
    still = [cx.fisher_matvec(), cx.hessian_matvec(), cx.exact_diag("fisher"), cx.hessian_free()]
    keyed = lambda tx: any(x.dtype == jnp.uint32 for x in jax.tree.leaves(tx.init(make_params())))
    assert all(map(keyed, drawing))
    assert not any(map(keyed, still))


def test_unknown_extra_args_change_nothing(tx):
    params, objective = make_params(), objective_on(make_batch())
    program = lambda **extra: jax.make_jaxpr(
        lambda p: tx.update(p, tx.init(p), p, value_fn=objective, **extra)
    )(params)
    assert str(program(flavour="vanilla", epoch=3)) == str(program())


def test_stage_inside_optax_chain_gives_the_same_update(results):
    assert_trees_close(results["chain"], results["alone"][0])


def test_stage_inside_inject_hyperparams_gives_the_same_update(row, results):
    updates, state = results["inject_hyperparams"]
    assert_trees_close(updates, results["alone"][0])
    assert set(state.hyperparams) == set(row.numbers)


def test_multi_steps_behind_a_stage_averages_the_updates_of_its_batches(results):
    waiting, updates, each = results["MultiSteps"]
    assert not any(map(jnp.any, jax.tree.leaves(waiting)))
    assert_trees_close(updates, jax.tree.map(lambda a, b: (a + b) / 2, *each))


def test_multi_steps_around_a_stage_that_evaluates_the_loss_is_refused(tx):
    several = optax.MultiSteps(tx, 2)
    if any(kind.evaluates_loss for kind in kinds(tx)):
        with pytest.raises(ValueError, match=r"last mini-batch.*microbatch="):
            several.init(make_params())
    else:
        several.init(make_params())


def test_stage_inside_apply_if_finite_gives_the_same_update(results):
    updates, state = results["apply_if_finite"]
    assert_trees_close((updates, state.inner_state), results["alone"])


def test_restricted_stage_steps_as_on_those_leaves_alone(results):
    assert_trees_close(results["restrict"]["hidden"], results["hidden alone"])
    grads = jax.grad(objective_on(make_batch()))(make_params())
    assert_trees_close(results["restrict"]["out"], grads["out"])


def test_stage_under_vmap_gives_the_same_update(results):
    first = jax.tree.map(lambda u: u[0], results["vmap"])
    assert_trees_close(first, results["alone"][0])


def test_bfloat16_parameters_get_finite_bfloat16_updates(results):
    leaves = jax.tree.leaves(results["bfloat16"])
    assert {u.dtype for u in leaves} == {jnp.dtype(jnp.bfloat16)}
    assert all(bool(jnp.isfinite(u).all()) for u in leaves)


def test_half_precision_parameters_warn_once(row, tx):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.eval_shape(tx.init, make_params(jnp.bfloat16))
    assert len(caught) == row.perturbs
    assert all("half precision" in str(warning.message) for warning in caught)


def test_empty_tree_gives_an_empty_update(tx):
    updates, state = first_step(tx, {}, lambda params, batch: batch["x"][:, :2])
    assert updates == {}
    chex.assert_trees_all_equal_structs(state, tx.init({}))


def test_none_leaves_change_no_program(tx):
    params = make_params()
    alone = jax.make_jaxpr(lambda p: first_step(tx, p))(params)
    params["hidden"]["scale"] = None
    assert str(jax.make_jaxpr(lambda p: first_step(tx, p))(params)) == str(alone)


def test_integer_leaves_are_refused_at_init(row, tx):
    params = {**make_params(), "hits": jnp.zeros(2, jnp.int32)}
    if row.differentiates:
        with pytest.raises(TypeError, match=r"`hits` has dtype int32.*`curvax\.restrict"):
            tx.init(params)
    else:
        tx.init(params)


def test_restrict_leaves_integer_leaves_outside():
    params = {**make_params(), "hits": jnp.ones(2, jnp.int32)}
    grads = jax.grad(objective_on(make_batch()), allow_int=True)(params)
    only_floats = jax.tree.map(lambda x: x.dtype != jnp.int32, params)
    tx = cx.restrict(cx.sam_perturb(0.1), only_floats)
    updates, _ = tx.update(grads, tx.init(params), params, value_fn=objective_on(make_batch()))
    floats = make_params()
    expected, _ = first_step(cx.sam_perturb(0.1), floats)
    assert_trees_close({name: updates[name] for name in floats}, expected)


@pytest.mark.parametrize(
    "build",
    [
        lambda key: cx.hutchinson_diag(key) | divide(),
        lambda key: cx.sam_perturb(0.1, ascent=cx.random_direction(key)),
    ],
)
def test_vmap_over_seeds_equals_a_loop_over_seeds(build):
    keys = jax.random.split(jax.random.key(5), 2)
    updates, state = jax.vmap(lambda key: first_step(build(key), make_params()))(keys)
    for i, key in enumerate(keys):
        alone = first_step(build(key), make_params())
        assert_trees_close(jax.tree.map(itemgetter(i), (updates, state)), alone)
    kernels = updates["hidden"]["kernel"]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-6
