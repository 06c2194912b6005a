"""Composition: the rules of `|`, the signal between stages, and the errors of misuse."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_problems import assert_trees_close, net_batch, net_loss, net_params

import curvax as cx


def objective() -> cx.Objective:
    return cx.Objective(net_loss, net_batch())


def step(tx: Any, state: Any = None, *, value_fn: Any = None, **extra: Any) -> tuple[Any, Any]:
    """(updates, state) after one step at the parameters of the net."""
    params, loss = net_params(), objective()
    _, grads = loss.value_and_grad(params)
    state = tx.init(params) if state is None else state
    return tx.update(grads, state, params, value_fn=value_fn or loss, **extra)


def plain_callable(params: Any) -> jax.Array:
    return net_loss(params, net_batch())


def my_stage(factor: float = 2.0) -> cx.Stage:
    """A user's own stage: it counts, and scales by its own factor and by an extra argument."""

    def rule(signal: cx.Signal, count: Any, params: Any, *, factor_now: float, **_: Any) -> Any:
        scaled = optax.tree.scale(factor * factor_now, signal.updates)
        return signal._replace(updates=scaled), count + 1

    return cx.stage(lambda params: jnp.zeros((), int), rule)


A, B, C, D = (
    lambda: cx.sam_perturb(0.1),
    lambda: cx.gsam_project(0.4),
    lambda: optax.ema(0.9),
    lambda: optax.scale_by_learning_rate(0.1),
)
GROUPINGS = {
    "from the left": lambda: ((A() | B()) | C()) | D(),
    "from the right": lambda: A() | (B() | cx.pipe(C(), D())),
    "in pairs": lambda: (A() | B()) | cx.pipe(C(), D()),
    "nested pipes": lambda: cx.pipe(A(), cx.pipe(B(), cx.pipe(C()), D())),
    "a chain at the end": lambda: cx.pipe(A(), B(), C(), D()),
}


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_composition_is_associative_and_its_state_flat(grouping):
    tx, reference = GROUPINGS[grouping](), A() | B() | C() | D()
    (updates, state), (expected, expected_state) = step(tx), step(reference)
    assert len(state) == 4
    assert_trees_close((updates, state), (expected, expected_state), tol=0)


def test_a_pipe_is_an_optax_transformation():
    tx = A() | optax.sgd(0.1)
    assert isinstance(tx, cx.Stage)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    assert isinstance(cx.pipe(optax.clip(1.0), optax.sgd(0.1)), cx.Stage)


def test_plain_part_before_a_stage_changes_its_gradient():
    clipped = optax.clip_by_global_norm(0.01) | cx.squared_gradient() | cx.scale_by_power(1.0)
    assert isinstance(clipped, cx.Stage)
    grads = jax.grad(objective())(net_params())
    shorter = optax.tree.scale(0.01 / optax.tree.norm(grads), grads)
    expected = jax.tree.map(lambda g: g / (g**2 + 1e-8), shorter)
    assert_trees_close(step(clipped)[0], expected)


def test_pipe_of_plain_parts_is_optax_chain():
    plain = cx.pipe(optax.clip(0.1), optax.adam(0.1))
    chained = optax.chain(optax.clip(0.1), optax.adam(0.1))
    assert_trees_close(step(plain)[0], step(chained)[0], tol=0)


def seen_by(note: dict[str, Any]) -> cx.Stage:
    """A stage that notes the signal that it receives."""

    def rule(signal: cx.Signal, state: Any, params: Any, **extra: Any) -> Any:
        note["signal"] = signal
        return signal, state

    return cx.stage(lambda params: (), rule)


def test_plain_part_changes_the_updates_alone():
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}
    make = lambda: cx.hutchinson_diag() | cx.sam_perturb(0.1) | seen_by(before)
    step(make() | optax.scale(3.0) | seen_by(after))
    first, last = before["signal"], after["signal"]
    assert_trees_close(last.updates, optax.tree.scale(3.0, first.updates), tol=0)
    assert first.diagonal is not None
    for field in set(cx.Signal._fields) - {"updates"}:
        assert getattr(last, field) is getattr(first, field), field


def test_signal_starts_with_gradient_and_value_of_the_clean_pass():
    note: dict[str, Any] = {}
    tx = seen_by(note) | optax.sgd(0.1)
    params, loss = net_params(), objective()
    value, grads = loss.value_and_grad(params)
    tx.update(grads, tx.init(params), params, value_fn=loss)
    signal = note["signal"]
    assert signal.updates is grads
    assert signal.gradient is grads
    assert signal.value is value
    tx.update(grads, tx.init(params), params, value=jnp.float32(7.0))
    assert note["signal"].value == 7
    tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)
    assert note["signal"].value is None


def test_own_stage_receives_extra_arguments_and_keeps_state():
    tx = my_stage(2.0) | optax.identity()
    updates, state = step(tx, factor_now=3.0)
    grads = jax.grad(plain_callable)(net_params())
    assert_trees_close(updates, optax.tree.scale(6.0, grads))
    assert state[0] == 1
    assert step(tx, state, factor_now=3.0)[1][0] == 2


def test_errors_call_a_stage_by_its_factory_or_its_name():
    pass_on = lambda signal, state, params, **extra: (signal, state)
    named = cx.stage(lambda params: (), pass_on, name="my_name")
    for tx, name in ((my_stage(), "my_stage"), (named, "my_name")):
        with pytest.raises(TypeError, match=f"`{name}` received masked parameters"):
            optax.masked(tx, {"hidden": True, "out": False}).init(net_params())


# What the error must show, so that the reader can paste it.
MISUSES = {
    "a number": (lambda: A() | 3, r"`optax\.scale\(\.\.\.\)`"),
    "a number first": (lambda: 3 | A(), r"`optax\.scale\(\.\.\.\)`"),
    "a factory without parentheses": (lambda: A() | optax.sgd, "needs its parentheses"),
    "a stage factory without parentheses": (lambda: A() | cx.gsam_project, "parentheses"),
    "masked": (
        lambda: optax.masked(A() | D(), {"hidden": True, "out": False}).init(net_params()),
        r"`curvax\.restrict\(stages, mask\)`",
    ),
    "Optax's partition": (
        lambda: optax.partition({"a": A(), "b": optax.sgd(0.1)}, {"hidden": "a", "out": "b"}).init(
            net_params()
        ),
        r"`curvax\.partition\(stages_by_label, labels\)`",
    ),
    "MultiSteps around a stage, inside a chain": (
        lambda: step(optax.chain(optax.MultiSteps(A(), 2).gradient_transformation(), D())),
        r"last mini-batch.*`sam_perturb\(\.\.\.\) \| optax\.MultiSteps\(base, k\)`.*microbatch=",
    ),
    "no value_fn": (
        lambda: A().update(net_params(), A().init(net_params()), net_params()),
        r"`tx\.update\(grads, state, params, value_fn=objective\)`",
    ),
    "no diagonal to smooth": (
        lambda: step(cx.ema_rms(0.9)),
        r"`ema_rms`.*`hutchinson_diag\(\) \| ema_rms\(\.\.\.\)`",
    ),
    "no diagonal to average": (
        lambda: step(cx.spatial_average()),
        r"`hutchinson_diag\(\) \| spatial_average\(\.\.\.\)`",
    ),
    "no diagonal to divide by": (
        lambda: step(A() | cx.scale_by_power(1.0)),
        r"`hutchinson_diag\(\) \| scale_by_power\(\.\.\.\)`",
    ),
    "no diagonal to keep": (
        lambda: step(cx.every(2, cx.record())),
        r"`every` keeps a diagonal.*hutchinson_diag",
    ),
    "a perturbation inside every": (
        lambda: step(cx.every(2, A())),
        r"`every\(k, \.\.\.\) \| sam_perturb\(\.\.\.\)`",
    ),
    "stages in optax.chain": (
        lambda: step(optax.chain(cx.hutchinson_diag(), cx.ema_rms(0.9))),
        r"between stages write `\|`",
    ),
    "no perturbation to project": (
        lambda: step(cx.gsam_project(0.4)),
        r"`sam_perturb\(0\.05\) \| gsam_project\(\.\.\.\)`",
    ),
    "no perturbation to penalise": (
        lambda: step(cx.penalize_gap(0.4)),
        r"`sam_perturb\(0\.05\) \| penalize_gap\(\.\.\.\)`",
    ),
    "no perturbation to reuse": (
        lambda: step(cx.keep_orthogonal()),
        r"`sam_perturb\(0\.05\) \| keep_orthogonal\(\.\.\.\)`",
    ),
    "perturbation and projection in optax.chain": (
        lambda: step(optax.chain(A(), B())),
        r"`sam_perturb\(0\.05\) \| gsam_project\(\.\.\.\)`",
    ),
    "groups of a plain callable": (
        lambda: step(cx.per_group(2, A()), value_fn=plain_callable),
        r"`value_fn=curvax\.Objective\(loss, batch\)`",
    ),
    "a fraction of a plain callable": (
        lambda: step(cx.hutchinson_diag(fraction=0.5), value_fn=plain_callable),
        r"`value_fn=curvax\.Objective\(loss, batch\)`",
    ),
    "shards of a plain callable": (
        lambda: step(cx.hutchinson_diag(shards=2), value_fn=plain_callable),
        r"`value_fn=curvax\.Objective\(loss, batch\)`",
    ),
    "a momentum inside every": (
        lambda: cx.every(2, cx.hutchinson_diag() | optax.ema(0.9)),
        r"`every\(k, \.\.\.\) \| ema\(\.\.\.\)`",
    ),
    "a preconditioner inside every": (
        lambda: step(cx.every(2, cx.hutchinson_diag() | cx.scale_by_power(1.0))),
        r"`every\(k, \.\.\.\) \| scale_by_power\(\.\.\.\)`",
    ),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_raises_with_what_to_write(misuse):
    act, cure = MISUSES[misuse]
    with pytest.raises((TypeError, ValueError), match=re.compile(cure, re.DOTALL)):
        act()


def test_record_sees_the_signal_at_its_place_in_the_pipe():
    size = lambda signal, params: optax.tree.norm(signal.updates)
    ratio = lambda signal, params: optax.tree.norm(signal.updates) / optax.tree.norm(params)
    tx = cx.record(before=size) | optax.scale(3.0) | cx.record(after=size, ratio=ratio)
    state = tx.init(net_params())
    assert np.isnan(cx.diagnostics(state)["before"])
    _, state = step(tx, state)
    norm = optax.tree.norm(jax.grad(objective())(net_params()))
    found = cx.diagnostics(state)
    expected = {
        "before": norm,
        "after": 3 * norm,
        "ratio": 3 * norm / optax.tree.norm(net_params()),
    }
    assert set(found) == set(expected)
    for name, value in found.items():
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, expected[name], rtol=1e-6)


def test_diagnostic_of_a_unique_name_is_found_by_optax():
    _, state = step(A() | B() | optax.sgd(0.1))
    gap = cx.diagnostics(state)["surrogate_gap"]
    assert gap == optax.tree.get(state, "surrogate_gap")


def test_diagnostics_of_the_same_name_are_numbered_by_their_stage():
    note = lambda scale: cx.record(norm=lambda s, p: scale * optax.tree.norm(s.updates))
    tx = note(1.0) | optax.scale(1.0) | note(3.0) | cx.record(loss=lambda s, p: s.value)
    _, state = step(tx)
    found = cx.diagnostics(state)
    assert set(found) == {"norm[0]", "norm[2]", "loss"}
    np.testing.assert_allclose(found["norm[2]"], 3 * found["norm[0]"], rtol=1e-6)


def test_diagnostics_are_found_inside_wrappers():
    inner = lambda: A() | optax.sgd(0.1)
    for tx in (
        optax.MultiSteps(inner(), 1),
        optax.apply_if_finite(inner(), 3),
        optax.chain(optax.identity(), inner()),
        cx.restrict(inner(), lambda params: jax.tree.map(lambda _: True, params)),
        cx.per_group(4, inner()),
    ):
        _, state = step(tx, value=1.0)
        np.testing.assert_allclose(cx.diagnostics(state)["rho"], 0.1, rtol=1e-6)


def test_diagnostics_of_two_partitions_have_their_labels():
    labels = {"hidden": "a", "out": "b"}
    tx = cx.partition({"a": cx.sam_perturb(0.1), "b": cx.sam_perturb(0.2)}, labels)
    _, state = step(tx)
    found = cx.diagnostics(state)
    np.testing.assert_allclose([found["rho[a]"], found["rho[b]"]], [0.1, 0.2], rtol=1e-6)
