"""Parts that are allowed before, after and around a stage that evaluates the loss."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec as P
from small_problems import assert_trees_close, net_batch, net_loss, net_params

import curvax as cx

RHO = 0.3
HALVES = [jax.tree.map(cut, net_batch()) for cut in (lambda x: x[:4], lambda x: x[4:])]


def sam_gradient(batch: Any, rho: float = RHO) -> Any:
    """∇L(θ + ρ g/‖g‖) by hand."""
    params, gradient = net_params(), jax.grad(net_loss)(net_params(), batch)
    scale = rho / optax.tree.norm(gradient)
    ahead = jax.tree.map(lambda w, g: w + scale * g, params, gradient)
    return jax.grad(net_loss)(ahead, batch)


def mean(*trees: Any) -> Any:
    return jax.tree.map(lambda *x: sum(x) / len(x), *trees)


def steps(tx: Any, batches: list[Any], **options: Any) -> list[Any]:
    """The updates of one step a batch, the parameters left where they are."""
    params, state, found = net_params(), tx.init(net_params()), []
    for batch in batches:
        objective = cx.Objective(net_loss, batch, **options)
        value, grads = objective.value_and_grad(params)
        updates, state = tx.update(grads, state, params, value_fn=objective, value=value)
        found.append(updates)
    return found


def one(tx: Any) -> Any:
    return steps(tx, [net_batch()])[0]


# Accumulation over mini-batches that differ.

several = functools.partial(optax.MultiSteps, every_k_schedule=2, accumulator_dtype=jnp.float64)
BEHIND: dict[str, Callable[[], Any]] = {
    "the object": lambda: cx.sam_perturb(RHO) | several(optax.sgd(1.0)),
    "as a transformation": lambda: (
        cx.sam_perturb(RHO) | several(optax.sgd(1.0)).gradient_transformation()
    ),
    "the base of a method": lambda: cx.sam(several(optax.sgd(1.0)), RHO),
    "through pipe": lambda: cx.pipe(cx.sam_perturb(RHO), several(optax.sgd(1.0))),
    "in optax.chain": lambda: optax.chain(
        cx.sam_perturb(RHO), several(optax.sgd(1.0)).gradient_transformation()
    ),
}


@pytest.mark.parametrize("behind", BEHIND)
def test_multi_steps_behind_gives_the_mean_of_the_mini_batches_sam_gradients(behind):
    waiting, updates = steps(BEHIND[behind](), HALVES)
    assert not any(map(np.any, jax.tree.leaves(waiting)))
    assert_trees_close(optax.tree.scale(-1.0, updates), mean(*map(sam_gradient, HALVES)))


def test_gsam_over_multi_steps_is_the_mean_of_its_updates():
    alone = steps(cx.gsam(optax.sgd(1.0), RHO, 0.4), HALVES)
    together = steps(cx.gsam(several(optax.sgd(1.0)), RHO, 0.4), HALVES)
    assert_trees_close(together[1], mean(*alone))


def test_multi_steps_passes_extra_arguments_on():
    seen = {}

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        seen.update(extra)
        return updates, state

    base = optax.GradientTransformationExtraArgs(lambda params: (), update)
    steps(cx.sam_perturb(RHO) | several(base), HALVES)
    assert {"value", "value_fn"} <= set(seen)


def test_microbatches_give_the_sam_gradient_of_the_whole_batch():
    updates = steps(cx.sam(optax.sgd(1.0), RHO), [net_batch()], microbatch=4)[0]
    assert_trees_close(optax.tree.scale(-1.0, updates), sam_gradient(net_batch()))


def injected(rho: Any) -> cx.Stage:
    return cx.sam(optax.sgd(0.1), rho)


AROUND: dict[str, Callable[[], Any]] = {
    "sam_perturb": lambda: cx.sam(optax.sgd(0.1)),
    "sam_perturb in a chain": lambda: optax.chain(
        optax.identity(), cx.sam_perturb(0.1), optax.sgd(0.1)
    ),
    "sam_perturb with injected numbers": lambda: optax.inject_hyperparams(injected)(rho=0.1),
    "hutchinson_diag": lambda: cx.adahessian(0.1),
    "every": lambda: cx.sophia_h(0.1),
    "hessian_matvec": lambda: cx.newton_cg(),
    "fisher_matvec": lambda: cx.natural_gradient(),
    "levenberg_marquardt": lambda: cx.hessian_free(),
    "per_group": lambda: cx.per_group(2, optax.identity()) | optax.sgd(0.1),
    "exact_diag": lambda: cx.exact_diag() | optax.sgd(0.1),
    "empirical_fisher_diag": lambda: cx.empirical_fisher_diag() | optax.sgd(0.1),
    "restrict": lambda: cx.restrict(cx.sam_perturb(0.1), {"hidden": True, "out": False}),
    "record": lambda: cx.record(again=lambda s, p, loss: loss(p)) | optax.sgd(0.1),
}


@pytest.mark.parametrize("around", AROUND)
def test_multi_steps_around_what_evaluates_the_loss_is_refused(around):
    with pytest.raises(ValueError, match=r"the last mini-batch.*`curvax\.Objective\(.*microbatch="):
        optax.MultiSteps(AROUND[around](), 2).init(net_params())


def test_multi_steps_is_refused_where_the_initialisation_is_traced():
    with pytest.raises(ValueError, match="the last mini-batch"):
        jax.eval_shape(optax.MultiSteps(cx.sam(optax.sgd(0.1)), lambda step: 2).init, net_params())


def test_multi_steps_of_a_schedule_that_starts_with_one_is_refused():
    with pytest.raises(ValueError, match="the last mini-batch"):
        optax.MultiSteps(cx.sam(optax.sgd(0.1)), lambda step: 1 + step // 100).init(net_params())


def test_multi_steps_of_one_step_is_allowed_around_sam():
    once = optax.MultiSteps(cx.sam(optax.sgd(1.0), RHO), 1, accumulator_dtype=jnp.float64)
    assert_trees_close(optax.tree.scale(-1.0, one(once)), sam_gradient(net_batch()))


def test_multi_steps_is_allowed_around_stages_that_evaluate_no_loss():
    adam = cx.squared_gradient() | cx.ema_mean(0.9) | cx.scale_by_power(0.5)
    _, updates = steps(several(adam), HALVES)
    whole = mean(*(jax.grad(net_loss)(net_params(), half) for half in HALVES))
    expected, _ = adam.update(whole, adam.init(net_params()), net_params())
    assert_trees_close(updates, expected)


# Parts before the stage.

clip, decay = optax.clip_by_global_norm(1e-3), optax.add_decayed_weights(0.3)
base = optax.sgd(1.0)
freeze = optax.masked(optax.set_to_zero(), {"hidden": True, "out": False})
LOST: dict[str, Callable[[], Any]] = {
    "clip | sam": lambda: clip | cx.sam(base),
    "decay | sam": lambda: decay | cx.sam(base),
    "momentum | gsam": lambda: cx.pipe(optax.trace(0.9), cx.gsam(base, 0.1, 0.3)),
    "clip | per_group": lambda: clip | cx.per_group(2, cx.sam_perturb(0.1)) | base,
    "clip | record | sam": lambda: clip | cx.record() | cx.sam(base),
    "clip | partition": lambda: (
        clip | cx.partition({"a": cx.sam(base), "b": base}, {"hidden": "a", "out": "b"})
    ),
    "a frozen part | sam": lambda: freeze | cx.sam(base),
    "MultiSteps | sam": lambda: cx.pipe(several(optax.identity()), cx.sam(base)),
    "inside per_group": lambda: cx.per_group(4, clip | cx.sam_perturb(0.1)) | base,
    "a preconditioner | sam": lambda: cx.squared_gradient() | cx.scale_by_power(0.5) | cx.sam(base),
    "restrict(clip) | sam": lambda: (
        cx.restrict(clip, {"hidden": True, "out": False}) | cx.sam(base)
    ),
    "sam | sam": lambda: cx.sam_perturb(0.1) | cx.sam_perturb(0.1),
    "chain(clip, sam)": lambda: optax.chain(clip, cx.sam(base)),
    "chain(decay, gsam)": lambda: optax.chain(decay, cx.gsam(base, 0.1, 0.3)),
    "chain(frozen, sam)": lambda: optax.chain(freeze, cx.sam(base)),
    "chain(clip, restrict(sam))": lambda: optax.chain(
        clip, cx.restrict(cx.sam(base), {"hidden": True, "out": False})
    ),
    "chain(clip, injected sam)": lambda: optax.chain(
        clip, optax.inject_hyperparams(injected)(rho=0.1)
    ),
    "chain(clip, chain(sam))": lambda: optax.chain(clip, optax.chain(cx.sam_perturb(0.1), base)),
}


@pytest.mark.parametrize("lost", LOST)
def test_updates_changed_before_sam_are_refused(lost):
    with pytest.raises(ValueError, match=r"would be lost.*(behind|`per_group)"):
        one(LOST[lost]())


def test_clipping_before_sam_is_refused_when_the_pipe_is_made():
    with pytest.raises(ValueError, match=r"`sam_perturb\(\.\.\.\) \| clip_by_global_norm\(\.\.\."):
        clip | cx.sam(base)


@pytest.mark.parametrize("change", [lambda g: 2 * g, lambda g: g.astype(jnp.float32), jnp.sign])
def test_gradient_changed_by_the_caller_is_refused(change):
    tx, params = cx.sam(base), net_params()

    def step(params: Any) -> Any:
        objective = cx.Objective(net_loss, net_batch())
        _, grads = objective.value_and_grad(params)
        grads = jax.tree.map(change, grads)
        return tx.update(grads, tx.init(params), params, value_fn=objective)[0]

    for run in (step, jax.jit(step)):
        with pytest.raises(ValueError, match=r"`objective\.value_and_grad\(params\)` returned"):
            run(params)


def test_gradient_of_unknown_origin_is_accepted():
    tx, params = cx.sam(base, RHO), net_params()
    objective = cx.Objective(net_loss, net_batch())
    grads = optax.tree.scale(2.0, jax.grad(objective)(params))
    updates, _ = tx.update(grads, tx.init(params), params, value_fn=objective)
    assert_trees_close(optax.tree.scale(-1.0, updates), sam_gradient(net_batch()))
    # Gradients given for other parameters say nothing of these.
    objective.value_and_grad(jax.tree.map(jnp.copy, params))
    tx.update(grads, tx.init(params), params, value_fn=objective)


PASSES: dict[str, Callable[[], Any]] = {
    "identity": lambda: optax.identity() | cx.sam(base, RHO),
    "identity in a chain": lambda: optax.chain(optax.identity(), cx.sam(base, RHO)),
    "snapshot": lambda: optax.snapshot("norm", optax.tree.norm) | cx.sam(base, RHO),
    "an estimator": lambda: cx.hutchinson_diag() | cx.sam(base, RHO),
    "a record": lambda: cx.record(norm=lambda s, p: optax.tree.norm(s.updates)) | cx.sam(base, RHO),
    "a mean over no axis": lambda: cx.pmean_updates("batch") | cx.sam(base, RHO),
}


@pytest.mark.parametrize("passes", PASSES)
def test_parts_that_keep_the_updates_are_allowed_before_sam(passes):
    assert_trees_close(optax.tree.scale(-1.0, one(PASSES[passes]())), sam_gradient(net_batch()))


def test_clipping_and_decay_act_after_sam():
    clipped = one(cx.sam_perturb(RHO) | clip | base)
    np.testing.assert_allclose(optax.tree.norm(clipped), 1e-3)
    pull = jax.tree.map(
        jnp.subtract, one(cx.sam_perturb(RHO) | decay | base), one(cx.sam(base, RHO))
    )
    assert_trees_close(pull, optax.tree.scale(-0.3, net_params()))


def test_hutchinson_diag_passes_a_clipped_gradient_on():
    grads = jax.grad(net_loss)(net_params(), net_batch())
    clipped = optax.tree.scale(1e-3 / optax.tree.norm(grads), grads)
    assert_trees_close(one(optax.chain(clip, cx.hutchinson_diag())), clipped)


# A missing mean over devices.


def on_devices(tx: Any, mapping: str, *, closure: bool = False, averaged: bool = False) -> Any:
    """The updates on four devices, [4, ...]."""
    batch = {"x": jnp.arange(48.0).reshape(4, 3, 4) / 48, "y": jnp.ones((4, 3, 2))}
    params = net_params()

    def step(batch: Any) -> Any:
        objective: Any = cx.Objective(net_loss, batch)
        _, grads = objective.value_and_grad(params)
        if averaged:
            grads = jax.lax.pmean(grads, "batch")
        value_fn = (lambda p: net_loss(p, batch)) if closure else objective
        return tx.update(grads, tx.init(params), params, value_fn=value_fn)[0]

    if mapping == "pmap":
        return jax.pmap(step, axis_name="batch", devices=jax.devices()[:4])(batch)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("batch",))
    own = lambda b: jax.tree.map(lambda x: x[None], step(jax.tree.map(lambda x: x[0], b)))
    mapped = jax.shard_map(
        own, mesh=mesh, in_specs=P("batch"), out_specs=P("batch"), check_vma=mapping == "typed"
    )
    return jax.jit(mapped)(batch)


FORGOTTEN: dict[str, Callable[[], Any]] = {
    "sam_perturb | sgd": lambda: cx.sam_perturb(0.1) | optax.sgd(0.1),
    "chain(sam_perturb, adam)": lambda: optax.chain(cx.sam_perturb(0.1), optax.adam(0.1)),
    "sam_perturb | sign_sgd": lambda: cx.sam_perturb(0.1) | optax.sign_sgd(0.1),
    "gsam": lambda: cx.sam_perturb(0.1) | cx.gsam_project(0.3) | optax.sgd(0.1),
    "per_group": lambda: cx.per_group(1, cx.sam_perturb(0.1)) | optax.sgd(0.1),
    "hutchinson_diag": lambda: cx.hutchinson_diag(mean_over="batch") | optax.sgd(0.1),
    "record": lambda: optax.chain(cx.record(), optax.sgd(0.1)),
}


@pytest.mark.parametrize("mapping", ["pmap", "untyped", "typed"])
@pytest.mark.parametrize("forgotten", FORGOTTEN)
def test_missing_mean_over_devices_is_refused(forgotten, mapping):
    with pytest.raises(ValueError, match=re.escape("pmean_updates('batch')")):
        on_devices(FORGOTTEN[forgotten](), mapping)


@pytest.mark.parametrize("averaged", [False, True])
def test_missing_mean_over_devices_is_refused_for_a_plain_callable(averaged):
    with pytest.raises(ValueError, match=r"each device's own.*`pmean_updates\(\(\)\)`"):
        on_devices(cx.sam_perturb(0.1) | base, "pmap", closure=True, averaged=averaged)


@pytest.mark.parametrize("mapping", ["pmap", "untyped", "typed"])
def test_gradient_averaged_by_the_trainer_is_refused(mapping):
    with pytest.raises(ValueError, match=r"`mean_over=`"):
        on_devices(cx.sam(base, 0.1, mean_over="batch"), mapping, averaged=True)


@pytest.mark.parametrize("mapping", ["pmap", "untyped", "typed"])
def test_pmean_updates_over_no_axes_keeps_updates_of_each_device(mapping):
    own = on_devices(cx.sam_perturb(0.1) | cx.pmean_updates(()) | base, mapping)
    whole = on_devices(cx.sam_perturb(0.1) | base | cx.pmean_updates("batch"), mapping)
    average = jax.tree.map(lambda x: jnp.broadcast_to(x.mean(0), x.shape), own)
    assert_trees_close(whole, average)
    assert np.std(ravel_pytree(own)[0].reshape(-1)) > 0


# Other names of the loss.


def test_obj_fn_and_loss_are_accepted_for_value_fn_and_value():
    params, loss = net_params(), lambda p: net_loss(p, net_batch())
    value, grads = jax.value_and_grad(loss)(params)
    tx = cx.sam(base, RHO)
    ours, state = tx.update(grads, tx.init(params), params, value_fn=loss, value=value)
    theirs, again = tx.update(grads, tx.init(params), params, obj_fn=loss, loss=value)
    assert_trees_close(theirs, ours, tol=0)
    assert cx.diagnostics(again)["surrogate_gap"] == cx.diagnostics(state)["surrogate_gap"]


def test_value_fn_and_value_take_precedence_over_obj_fn_and_loss():
    params, loss = net_params(), lambda p: net_loss(p, net_batch())
    value, grads = jax.value_and_grad(loss)(params)
    tx = cx.sam(base, RHO)
    _, state = tx.update(
        grads, tx.init(params), params, value_fn=loss, obj_fn=None, value=value, loss=value + 1
    )
    assert cx.diagnostics(state)["loss"] == np.float32(value)
    for other in (loss, {"loss": value}, jnp.ones(3)):
        tx.update(grads, tx.init(params), params, value_fn=loss, loss=other)


def test_value_that_is_not_a_scalar_is_refused():
    params, loss = net_params(), lambda p: net_loss(p, net_batch())
    tx, grads = cx.sam(base, RHO), jax.grad(loss)(net_params())
    for value in ((loss(params), {"aux": 1}), jnp.ones(8), jnp.ones(1), "0.3"):
        with pytest.raises(TypeError, match=r"`tx\.update\(\.\.\., value=\)`.*a scalar"):
            tx.update(grads, tx.init(params), params, value_fn=loss, value=value)


@pytest.mark.parametrize("number", [float, np.float32, np.float64, np.asarray, jnp.asarray])
def test_loss_of_any_floating_scalar_type_is_the_value(number):
    params, loss = net_params(), lambda p: net_loss(p, net_batch())
    value, grads = jax.value_and_grad(loss)(params)
    tx = cx.sam(base, RHO)
    _, state = tx.update(grads, tx.init(params), params, value_fn=loss, loss=number(value))
    np.testing.assert_allclose(cx.diagnostics(state)["loss"], value, rtol=1e-6)


def test_value_fn_with_other_arguments_raises_with_the_objective():
    params, tx = net_params(), cx.sam(base, RHO)
    grads = jax.grad(net_loss)(params, net_batch())
    with pytest.raises(TypeError, match=r"`loss\(params\)`.*curvax\.Objective\(loss, batch\)"):
        tx.update(grads, tx.init(params), params, value_fn=net_loss)
    with pytest.raises(TypeError, match=r"`value_fn` is not a function but a float.*`value=`"):
        tx.update(grads, tx.init(params), params, value_fn=0.3)


@pytest.mark.parametrize("part", [lambda: optax.apply_every(2), lambda: several(optax.identity())])
def test_gradient_accumulation_before_newton_is_refused(part):
    with pytest.raises(ValueError, match=r"the last one alone.*microbatch="):
        cx.pipe(part(), cx.newton_cg())
    cx.pipe(optax.MultiSteps(optax.identity(), 1), cx.newton_cg())


LAID_OUT: dict[str, Callable[[Any], Any]] = {
    "a sharding constraint": lambda g: jax.lax.with_sharding_constraint(
        g, jax.sharding.SingleDeviceSharding(jax.devices()[0])
    ),
    "an optimization barrier": jax.lax.optimization_barrier,
    "a cast to a wider float": lambda g: jax.tree.map(lambda x: x.astype(jnp.float64), g),
}


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="needs JAX 0.10: tracers know no origin")
@pytest.mark.parametrize("laid_out", LAID_OUT)
def test_gradient_with_another_sharding_is_the_gradient(laid_out):
    tx = cx.sam(base, RHO)
    params = net_params(jnp.float32)

    def step(params: Any, change: Callable[[Any], Any]) -> Any:
        objective = cx.Objective(net_loss, net_batch())
        _, grads = objective.value_and_grad(params)
        return tx.update(change(grads), tx.init(params), params, value_fn=objective)[0]

    found, expected = (
        jax.jit(functools.partial(step, change=change))(params)
        for change in (LAID_OUT[laid_out], lambda g: g)
    )
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(x, y, rtol=1e-5)


def test_a_gradient_that_ends_in_a_cast_is_the_gradient():
    """A model that computes in bfloat16 gives gradients that were cast wider by JAX itself."""
    in_bfloat16 = lambda p, b: net_loss(jax.tree.map(lambda x: x.astype(jnp.bfloat16), p), b)
    params, tx = net_params(jnp.float32), cx.sam(base, RHO)

    @jax.jit
    def step(params: Any) -> Any:
        objective = cx.Objective(in_bfloat16, net_batch())
        _, grads = objective.value_and_grad(params)
        found = tx.update(grads, tx.init(params), params, value_fn=objective)[0]
        at = optax.tree.add(params, optax.tree.scale(RHO / optax.tree.norm(grads), grads))
        return found, jax.grad(in_bfloat16)(at, net_batch())

    found, grads = step(params)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(grads)):
        np.testing.assert_allclose(x, -y, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("method", ["sam", "adahessian", "newton_cg", "hessian_free"])
def test_parameters_sharded_along_a_mapped_axis_are_refused(method):
    make = {
        "sam": lambda: cx.sam(base, RHO, mean_over="batch"),
        "adahessian": lambda: cx.adahessian(0.1, mean_over="batch"),
        "newton_cg": lambda: cx.newton_cg(mean_over="batch"),
        "hessian_free": lambda: cx.hessian_free(mean_over="batch"),
    }
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("batch", "model"))

    def step(params: Any, batch: Any) -> Any:
        predict = lambda p, b: jax.lax.psum(jnp.tanh(b["x"] @ p["hidden"]) @ p["out"], "model")
        objective = cx.Objective(cx.gaussian("y"), batch, model=predict)
        _, grads = objective.value_and_grad(params)
        tx = make[method]()
        return tx.update(grads, tx.init(params), params, value_fn=objective)[0]

    split = {"hidden": P(None, "model"), "out": P("model")}
    params = {"hidden": jnp.ones((4, 6)) / 3, "out": jnp.ones((6, 2))}
    mapped = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(split, P("batch")), out_specs=split))
    with pytest.raises(ValueError, match=r"split along the mapped axis 'model'.*axis_names"):
        mapped(params, net_batch())
