"""Composition: a stage is a rule on signals, a pipe is stages in a row, both are Optax's.

Signal in, signal out; plain updates in, plain updates out. So `|` is associative, the state of a
pipe is a flat tuple with one entry per part, and every Optax wrapper takes a pipe.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.devices import axes
from curvax.objective import Objective, as_objective
from curvax.parameter_roles import frozen
from curvax.pipes import order


class Signal(NamedTuple):
    """What travels between the stages of a pipe within one `update`; it never enters the state.

    Attributes:
        updates: what Optax passes on, a tree like the parameters.
        gradient: ∇L(θ) before any perturbation, a tree like the parameters.
        diagonal: a diagonal of the curvature, in float32 or wider, shaped like the parameters.
        matvec: the curvature as a product v ↦ C v on such trees.
        value: L(θ), a scalar of the clean pass; None where nothing told it.
        perturbed_value: L at the perturbed point, a scalar; as last measured, over all devices, on
            steps that `sam_perturb(every=)` skips.
        aux: what the loss returned beside its value in the clean pass.
        perturbed: whether `updates` were taken at the perturbed point this step, traced or not;
            None where nobody said.
        local: the device axes over which `updates` are this device's own.
        averaged: the device axes over which updates have been averaged, be they local again or not.
    """

    updates: Tree
    gradient: Tree = None
    diagonal: Tree = None
    matvec: Callable[[Tree], Tree] | None = None
    value: jax.Array | None = None
    perturbed_value: jax.Array | None = None
    aux: Any = None
    perturbed: jax.Array | bool | None = None
    local: frozenset[str] = frozenset()
    averaged: frozenset[str] = frozenset()


Rule = Callable[..., tuple[Signal, Any]]


class Stage(optax.GradientTransformationExtraArgs):
    """An Optax transformation that also passes on curvature, and composes with `|`."""

    def __or__(self, other: optax.GradientTransformation) -> Stage:
        return pipe(self, other)

    def __ror__(self, other: optax.GradientTransformation) -> Stage:
        return pipe(other, self)


def stage(
    init: Callable[[Tree], Any],
    rule: Rule,
    *,
    name: str | None = None,
    evaluates_loss: bool | None = None,
    replaces_gradient: bool = False,
    complex_leaves: bool = False,
) -> Stage:
    """Lifts a rule on signals to a stage.

    Args:
        init: `params -> state`.
        rule: `rule(signal, state, params, **extra) -> (signal, state)`, where `extra` holds what
            the caller gave to `update`: `value_fn`, `value`, and whatever else it pleases.
        name: what errors call it; by default the function that the rule was written in.
        evaluates_loss: whether the rule evaluates the loss of the batch at hand, so that
            `optax.MultiSteps` around it, which hands it the mean gradient of several, is an error.
            By default, whether it takes `value_fn` by name.
        replaces_gradient: whether it does so to put a gradient of its own in the place of the
            updates, so that what changes them before it is an error too.
        complex_leaves: whether it is right for complex parameters too; else they are an error at
            init.

    Returns:
        A stage; `stage(init, rule) | optax.adam(1e-3)` is one more.
    """
    name = name or rule.__qualname__.split(".")[0]
    if evaluates_loss is None:
        evaluates_loss = "value_fn" in inspect.signature(rule).parameters
    return _lifted(
        init,
        rule,
        name,
        (Kind(name, evaluates_loss, replaces_gradient),),
        complex_leaves=complex_leaves,
    )


def pipe(*parts: optax.GradientTransformation) -> Stage:
    """The parts one after the other, as a stage: `a | b | c` as a function.

    A plain Optax part in the middle sees and changes the updates alone. Two plain parts cannot
    start with `|`, so they start here. `optax.MultiSteps` is taken as it is.

    Raises:
        TypeError: a part is no gradient transformation.
        ValueError: a plain part changes the updates before a stage that replaces them.
    """
    parts = tuple(piece for part in parts for piece in _pieces(part))
    _refuse_lost(parts)

    def init(params: Tree) -> tuple[Any, ...]:
        states = tuple(part.init(params) for part in parts)
        frozen.warn_of_frozen(parts, states, params)
        return states

    climbing = [part.init.perturbs for part in parts if hasattr(part.init, "perturbs")]
    if climbing:
        init.perturbs = climbing[0]  # type: ignore[attr-defined]

    def rule(signal: Signal, state: tuple[Any, ...], params: Tree = None, **extra: Any) -> Any:
        new_state = []
        for part, inner in zip(parts, state, strict=True):
            signal, inner = step(part, signal, inner, params, **extra)
            new_state.append(inner)
        return signal, tuple(new_state)

    name = " | ".join(map(name_of, parts))
    below = tuple(kind for part in parts for kind in kinds(part))
    return _lifted(init, rule, name, below, parts)


def step(
    part: optax.GradientTransformation, signal: Signal, state: Any, params: Tree, **extra: Any
) -> tuple[Signal, Any]:
    """One part applied to a signal; a plain Optax part sees and changes the updates alone."""
    if isinstance(part, Stage):
        return part.update(signal, state, params, **extra)
    _refuse_local_moments(part, state, signal)
    part = optax.with_extra_args_support(part)
    updates, state = part.update(signal.updates, state, params, **extra)
    # Where types tell, a plain part that averages over devices is seen to.
    local = signal.local & axes.varying(updates) if axes.tracked() else signal.local
    return signal._replace(updates=updates, local=local), state


def name_of(part: optax.GradientTransformation) -> str:
    """What the user called it: `hutchinson_diag`, `ema`."""
    if isinstance(part.update, _Update):
        return part.update.name
    return getattr(part.update, "__qualname__", type(part).__name__).split(".")[0]


def parts_of(part: optax.GradientTransformation) -> tuple[optax.GradientTransformation, ...]:
    """The parts of a pipe; of anything else, itself."""
    inner = part.update.parts if isinstance(part.update, _Update) else ()
    return inner or (part,)


class Kind(NamedTuple):
    """What a stage asks of the loss, by its name."""

    name: str
    evaluates_loss: bool
    replaces_gradient: bool
    converted: bool = False
    """Whether the gradient may reach it in another convention than the objective's."""


def kinds(part: optax.GradientTransformation) -> tuple[Kind, ...]:
    """What a stage, and the stages inside it, ask of the loss; nothing is known of a plain part."""
    return part.update.kinds if isinstance(part.update, _Update) else ()


def containing(
    init: Callable[[Tree], Any],
    rule: Rule,
    *inner: optax.GradientTransformation,
    evaluates_loss: bool = False,
    converted: bool = False,
) -> Stage:
    """A stage around others, which asks of the loss what they ask.

    `converted`: it takes the gradient in another convention than the objective's, too.
    """
    name = rule.__qualname__.split(".")[0]
    below = tuple(kind for part in inner for kind in kinds(part))
    if converted:
        below = tuple(kind._replace(converted=True) for kind in below)
    return _lifted(init, rule, name, (Kind(name, evaluates_loss, False), *below))


def _lifted(
    init: Callable[[Tree], Any],
    rule: Rule,
    name: str,
    kinds: tuple[Kind, ...],
    parts: tuple[Any, ...] = (),
    *,
    complex_leaves: bool = True,
) -> Stage:
    return Stage(_Init(init, name, kinds, complex_leaves), _Update(rule, name, kinds, parts))


class _Init:
    def __init__(
        self,
        init: Callable[[Tree], Any],
        name: str,
        kinds: tuple[Kind, ...],
        complex_leaves: bool,
    ):
        self.init, self.name, self.kinds = init, name, kinds
        self.complex_leaves = complex_leaves
        if hasattr(init, "perturbs"):
            # Which leaves a stage perturbs; a pipe and `per_group` pass it on.
            self.perturbs = init.perturbs

    def __call__(self, params: Tree) -> Any:
        checks.refuse_masked(params, self.name)
        if not self.complex_leaves:
            checks.refuse_complex(params, self.name)
        for kind in self.kinds:
            if kind.evaluates_loss:
                order.refuse_multi_steps_around(kind.name, replaces_gradient=kind.replaces_gradient)
        return self.init(trees.arrays(params))


class _Update:
    """The lift: plain updates become a signal on the way in, and are taken from it at the end."""

    def __init__(self, rule: Rule, name: str, kinds: tuple[Kind, ...], parts: tuple[Any, ...] = ()):
        self.rule, self.name, self.kinds, self.parts = rule, name, kinds, parts

    def __call__(self, updates: Any, state: Any, params: Tree = None, **extra: Any) -> Any:
        if isinstance(updates, Signal):
            return self.rule(updates, state, params, **extra)
        checks.refuse_masked(updates, self.name)
        extra = _by_our_names(extra)
        value_fn = extra.get("value_fn")
        for kind in self.kinds:
            told = kind.replaces_gradient and not kind.converted
            if told and isinstance(value_fn, Objective):
                order.refuse_changed_gradient(value_fn, params, updates, kind.name)
        checks.refuse_unlike(updates, params, self.name)
        updates, params = trees.arrays((updates, params))
        signal, state = self.rule(_begin(updates, params, extra), state, params, **extra)
        order.refuse_unaveraged(signal.local, self.name)
        return signal.updates, state


def _by_our_names(extra: dict[str, Any]) -> dict[str, Any]:
    """The extra arguments with what others call `obj_fn` and `loss` as `value_fn` and `value`.

    `obj_fn` is Optax's name in `optax.contrib.sophia`, and Levanter's; a `loss` is the value where
    it is a scalar number.
    """
    found = dict(extra)
    if found.get("value_fn") is None and callable(found.get("obj_fn")):
        found["value_fn"] = found["obj_fn"]
    loss = found.get("loss")
    numbers = (float, np.floating, np.ndarray, jax.Array)
    if found.get("value") is None and isinstance(loss, numbers) and not jnp.ndim(loss):
        found["value"] = loss
    checks.refuse_no_value(found.get("value"))
    return found


def _begin(updates: Tree, params: Tree, extra: Any) -> Signal:
    """The signal of plain updates, with what the objective remembers of them.

    The loss is the one that the caller gave or the objective remembers; never a hidden pass.
    """
    value, value_fn = extra.get("value"), extra.get("value_fn")
    given = value_fn.gave(params, updates) if isinstance(value_fn, Objective) else None
    if value is None and given is not None:
        value = given.value
    value = None if value is None else trees.widen(value)
    local = frozenset() if given is None else given.local
    return Signal(updates, gradient=updates, value=value, perturbed=False, local=local)


def _pieces(part: Any) -> tuple[optax.GradientTransformation, ...]:
    if steps := order.multi_steps_of(part):
        return (optax.GradientTransformationExtraArgs(steps.init, steps.update),)
    if not isinstance(part, optax.GradientTransformation):
        raise TypeError(
            "The parts of a pipe are stages and Optax transformations, and one of them is "
            f"{part!r}. Write for instance `sam_perturb(0.05) | optax.sgd(0.1)`; a factory needs "
            "its parentheses, a number its `optax.scale(...)`."
        )
    return parts_of(part)


def _refuse_lost(parts: tuple[optax.GradientTransformation, ...]) -> None:
    """Refuses plain parts before a stage that replaces the updates, and accumulation before one
    that evaluates the loss."""
    for place, part in enumerate(parts):
        behind = (kind for later in parts[place + 1 :] for kind in kinds(later))
        stage = next((kind.name for kind in behind if kind.replaces_gradient), None)
        if stage and not isinstance(part, Stage):
            order.refuse_part_before(name_of(part), stage)
        behind = (kind for later in parts[place + 1 :] for kind in kinds(later))
        stage = next((kind.name for kind in behind if kind.evaluates_loss), None)
        if stage and not isinstance(part, Stage):
            order.refuse_accumulation_before(part, name_of(part), stage)


def _refuse_local_moments(part: optax.GradientTransformation, state: Any, signal: Signal) -> None:
    if signal.local and any(jnp.ndim(x) and trees.is_float(x) for x in jax.tree.leaves(state)):
        axis = sorted(signal.local)
        raise ValueError(
            f"`{name_of(part)}` would build its moments from the updates of one device, and each "
            f"device of {axis} would go its own way. Put `pmean_updates({axis[0]!r})` before it "
            "(`mean_over=` in a method), or `pmean_updates(())` if that is meant."
        )


def weight_of(signal: Signal, value_fn: Any, over: tuple[str, ...], stage: str) -> jax.Array | None:
    """What the updates count in a mean over these device axes; None where all count alike.

    The weight of the examples that they come from. Where an earlier stage has averaged over a
    device axis, those of all devices along it (which `axes.mean` knows where types tell).

    Raises:
        ValueError: the mean is over a part of the axes, and nothing tells what was averaged before.
    """
    weight = None if value_fn is None else as_objective(value_fn, stage).batch_weight()
    if weight is None or axes.tracked():
        return weight
    if over and not signal.local and not signal.averaged and set(over) < set(axes.manual()):
        raise ValueError(
            f"`{stage}` averages over {list(over)} of the device axes {list(axes.manual())}, where "
            "devices count by the weights of their examples, and cannot know over which axes the "
            "updates have been averaged before: they came from no stage of this pipe and are not "
            "the objective's own gradient. Write the stages as one pipe, `a | b` instead of "
            "`optax.chain(a, b)`, average over all axes at once, or leave `check_vma=True`."
        )
    before = signal.averaged - signal.local
    return axes.total(weight, tuple(axis for axis in axes.manual() if axis in before))


class StepState(NamedTuple):
    """The state of a stage that keeps nothing but the time."""

    step: jax.Array
    """Steps taken, int32 scalar: what schedules are called with."""


def at(value: Any, count: jax.Array) -> Any:
    """A hyperparameter at a step: a schedule is called with it, anything else is itself."""
    return value(count) if callable(value) else value
